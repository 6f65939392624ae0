"""Computes a step's temporary memory on one device, in bytes, by formula.

Layers run one after the other, so that the layer with the largest temporaries decides. They grow
neither with the number of layers nor with the cache, which is updated in place. The formula is
checked against the compiler for H100 in tests/plan/test_plan_compiled.py.

Shape letters: T tokens, D embed, F feed-forward width, R rows of the experts' blocks.
"""

import collections
import dataclasses
import math
from collections.abc import Callable

from jaxmoe.config import LayerKind
from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.share import DeviceShare, device_share
from jaxmoe.plan.work import Work, stored_params
from pallas_kernels.experts.group_metadata import rows_of_whole_groups

BF16, FP32 = 2, 4
LARGEST_BLOCK = {"bf16": 128, "fp8": 128, "int8": 128, "int4": 64}  # rows, of Llama 4's experts
SEARCHED = 6  # arrays as large as the logits, while a token is chosen
LEAST_ROWS = 64  # XLA pads the rows of a product to a multiple of this


def temporaries(work: Work, mesh: MeshConfig) -> int:
    """Bytes of temporaries of a decoding or prefill step."""
    share = device_share(work, mesh)
    layer = max(_layer(work, mesh, share, kind) for kind in dict.fromkeys(work.config.layers))
    logits = share.rows * _row_of_logits(work, mesh)
    padded = -(-share.rows // LEAST_ROWS) * LEAST_ROWS  # logits are a slice of a padded product
    return logits + max(layer + gathered(work, mesh), padded * _row_of_logits(work, mesh))


def batch_temporaries(work: Work, mesh: MeshConfig, tokens: int) -> int:
    """Bytes of temporaries of an engine's step, and of choosing the next tokens after it.

    The two are programs of their own, so that the larger one counts. To choose takes the logits, a
    copy that is scaled, and what a search over them keeps: masks and digits of their masses.

    Args:
        work: whose rows write at once.
        tokens: of the step, prompts and answers together.
    """
    reading = dataclasses.replace(work, task="prefill", rows=1, prefill_chunk=tokens)
    share = device_share(reading, mesh)
    layer = max(_layer(reading, mesh, share, kind) for kind in dict.fromkeys(work.config.layers))
    rows = -(-work.rows // LEAST_ROWS) * LEAST_ROWS
    return max(layer + gathered(work, mesh), SEARCHED * rows * _row_of_logits(work, mesh))


def _layer(work: Work, mesh: MeshConfig, share: DeviceShare, kind: LayerKind) -> int:
    """Bytes of the phase of a layer that needs most: SwiGLU, attention, an all-reduce, experts."""
    config = work.config
    stream = share.tokens * config.hidden_size * BF16  # one activation [T, D]
    is_moe = kind.feed_forward == "moe"
    width = (config.intermediate_size if is_moe else config.intermediate_size_mlp) // mesh.tensor
    # The residual, its norm, the input and output, and in MoE layers the routed experts' output.
    swiglu = (4 + is_moe) * stream + 2 * share.tokens * width * BF16
    phases = [swiglu, _attention(work, mesh, share, stream)]
    if mesh.tensor > 1:  # an all-reduce has an input and an output; XLA's products are float32
        wide = FP32 if work.format is None else BF16
        phases.append(3 * stream + 2 * share.tokens * config.hidden_size * wide)
    if is_moe:
        phases.append(3 * stream + _experts(work, mesh, share))
    return max(phases)


def _attention(work: Work, mesh: MeshConfig, share: DeviceShare, stream: int) -> int:
    """Bytes of attention: queries of all new tokens [bfloat16], and float32 outputs to merge."""
    copies = 3 * share.rows * work.tokens * share.heads * work.config.head_dim
    return 2 * stream + copies * BF16


def _experts(work: Work, mesh: MeshConfig, share: DeviceShare) -> int:
    """Bytes of the experts: rows before and after, their hidden values, buffers of the exchange."""
    config = work.config
    D, F = config.hidden_size, config.intermediate_size // mesh.tensor
    items = share.group * config.num_experts_per_tok
    experts = config.num_local_experts
    rows = expert_rows(items, experts, experts // mesh.expert, LARGEST_BLOCK[work.weights])
    # Buffers of all tokens of the expert group.
    buffers = {"replicated": 0, "all_gather": 1, "all_to_all": 3}[share.exchange]
    return (2 * rows * D + rows * F + buffers * items * D) * BF16


def expert_rows(items: int, experts: int, here: int, largest: int) -> int:
    """R, the number of rows that `pallas_kernels.experts.make_group_metadata` makes on Hopper.

    Args:
        items: tokens times experts per token.
        experts: experts of the layer.
        here: experts on the device.
        largest: rows of the largest block.
    """
    block = rows_of_whole_groups(items, experts, largest)  # no fewer than other devices take
    return min(items, items // block + here) * block


def layer_of(name: str) -> str:
    """The layer of a parameter, `layers.3`; what is in no layer is one by itself."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else name


def module_of(name: str) -> str:
    """The module of a parameter, `layers.3.attention` or `layers.3.feed_forward.experts`."""
    return name.rpartition(".")[0] or name


def gathered(
    work: Work,
    mesh: MeshConfig,
    group: Callable[[str], str] = layer_of,
    twice: tuple[str, ...] = ("gate", "up"),
) -> int:
    """Bytes of the largest group of weights after gathering them over fsdp.

    Args:
        group: the name of a weight's group, whose weights are there together; default: its layer.
        twice: the matrices that are held twice: as they come, and with their axes in order.
    """
    if mesh.fsdp == 1:
        return 0
    at_use = dataclasses.replace(mesh, fsdp=1)
    sizes: collections.Counter[str] = collections.Counter()
    for stored in stored_params(work.config, work.format):
        name = stored.name.split("[")[0]
        if "embed" in stored.axes and not stored.is_vision:
            copies = 2 if name.rpartition(".")[2] in twice else 1
            sizes[group(name)] += copies * stored.nbytes(at_use) // stored.count
    return max(sizes.values())


def _row_of_logits(work: Work, mesh: MeshConfig) -> int:
    return math.ceil(work.config.vocab_size / mesh.tensor) * FP32
