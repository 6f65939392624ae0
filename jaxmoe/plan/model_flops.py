"""The floating-point operations that a model's training step cannot avoid, for MFU."""

import math
from collections.abc import Callable

from jaxmoe.config import Llama4Config
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.params import named_specs
from jaxmoe.plan.share import device_share
from jaxmoe.plan.speed import attention_flops
from jaxmoe.plan.work import Work

TRAINED, FROZEN = 3, 2  # products for each of the forward pass: backward for inputs, for weights


def model_flops(
    config: Llama4Config, rows: int, length: int, trained: Callable[[str], bool]
) -> float:
    """Operations of a training step, without anything that is computed again.

    A product with a matrix is 2 operations for each parameter and each token that it is applied to,
    of routed experts for those that a token chooses; three times that where the matrix is trained,
    forward and two products backward, and twice where it is frozen. Attention is two products
    forward and four backward for each query and each key that it sees: of a global layer all before
    it, of a local layer those of its chunk. Each row counts as one document. Norms, softmax, the
    vision tower and adapters do not count.

    Args:
        config: the model.
        rows: of a step, over all devices.
        length: tokens of each row.
        trained: whether the parameter of a dotted name is trained.
    """
    share_of_experts = config.num_experts_per_tok / max(1, config.num_local_experts)
    products = 0.0
    for name, spec in named_specs(config).items():
        embeds = name == "embed" and not config.tie_word_embeddings
        if len(spec.shape) < 2 or embeds or name.startswith("vision."):
            continue
        uses = share_of_experts if ".experts." in name else 1.0
        products += 2 * math.prod(spec.shape) * uses * (TRAINED if trained(name) else FROZEN)
    context = min(length, config.max_position_embeddings)
    work = Work(config=config, task="train", context=context, rows=rows)
    attention = attention_flops(work, MeshConfig(), device_share(work, MeshConfig()))
    return products * rows * length + TRAINED * attention * length / context
