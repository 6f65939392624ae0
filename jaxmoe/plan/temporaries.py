"""Memory of a step beyond its arguments: what must be there at once, in bytes.

Layers run one after the other, so it is that of the layer that needs most; it does not grow with
the number of layers, and not with the cache, which is updated in place. Checked against the
compilers in tests/plan/test_plan_absent.py.

Shape letters: T tokens, D embed, F feed-forward width, R rows of the experts' blocks.
"""

import collections
import dataclasses
import math

from jaxmoe.config import LayerKind
from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.spread import Spread, spread
from jaxmoe.plan.work import Work, stored_params

BF16, FP32 = 2, 4
BLOCK = 128  # rows that meet one matrix at a time, at most
LEAST_ROWS = 64  # XLA pads a product's rows to a tile


def temporaries(work: Work, mesh: MeshConfig) -> int:
    """Of one device, in a step of decoding or prefill."""
    share = spread(work, mesh)
    layer = max(_layer(work, mesh, share, kind) for kind in dict.fromkeys(work.config.layers))
    logits = share.rows * _row_of_logits(work, mesh)
    padded = -(-share.rows // LEAST_ROWS) * LEAST_ROWS  # the product that they are cut from
    return logits + max(layer + _gathered(work, mesh), padded * _row_of_logits(work, mesh))


def _layer(work: Work, mesh: MeshConfig, share: Spread, kind: LayerKind) -> int:
    """The largest of a layer's phases."""
    config = work.config
    stream = share.tokens * config.hidden_size * BF16  # T x D: one copy of the tokens
    is_moe = kind.feed_forward == "moe"
    width = (config.intermediate_size if is_moe else config.intermediate_size_mlp) // mesh.tensor
    # The residual, its norm and their like; what the experts gave waits for the shared expert.
    swiglu = (4 + is_moe) * stream + 2 * share.tokens * width * BF16
    phases = [swiglu, _attention(work, mesh, share, stream)]
    if mesh.tensor > 1:  # a product is reduced into another array; wide, unless a kernel made it
        wide = FP32 if work.format is None else BF16
        phases.append(3 * stream + 2 * share.tokens * config.hidden_size * wide)
    if is_moe:
        phases.append(3 * stream + _experts(work, mesh, share))
    return max(phases)


def _attention(work: Work, mesh: MeshConfig, share: Spread, stream: int) -> int:
    """Queries of all new tokens, and what they give, in float32 where devices' parts are merged."""
    copies = 3 * share.rows * work.tokens * share.heads * work.config.head_dim
    return 2 * stream + copies * BF16


def _experts(work: Work, mesh: MeshConfig, share: Spread) -> int:
    """Rows coming and going, and their hidden values; room for all tokens of the group."""
    config = work.config
    D, F = config.hidden_size, config.intermediate_size // mesh.tensor
    items = share.group * config.num_experts_per_tok
    rows = expert_rows(items, config.num_local_experts, config.num_local_experts // mesh.expert)
    room = {"stay": 0, "gather": 1, "exchange": 3}[share.way]  # of tokens from other devices
    return (2 * rows * D + rows * F + room * items * D) * BF16


def expert_rows(items: int, experts: int, here: int) -> int:
    """R: as `pallas_kernels.experts.group_metadata` places items in blocks."""
    half = max(1, items // (2 * experts))
    block = min(BLOCK, max(8, 1 << (half.bit_length() - 1)))
    return min(items, items // block + here) * block


def _gathered(work: Work, mesh: MeshConfig) -> int:
    """Weights of one layer, whole, where fsdp spreads them; gate and up also as they came."""
    if mesh.fsdp == 1:
        return 0
    at_use = dataclasses.replace(mesh, fsdp=1)
    by_layer: collections.Counter[str] = collections.Counter()
    for each in stored_params(work.config, work.format):
        parts = each.name.split(".")
        twice = 2 if parts[-1].split("[")[0] in ("gate", "up") else 1
        if "embed" in each.axes:
            layer = ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
            by_layer[layer] += twice * each.nbytes(at_use) // each.count
    return max(by_layer.values())


def _row_of_logits(work: Work, mesh: MeshConfig) -> int:
    return math.ceil(work.config.vocab_size / mesh.tensor) * FP32


def training_temporaries(work: Work, mesh: MeshConfig) -> int:
    """With recomputed layers: gradients, bfloat16 weights, each layer's input, one layer, logits.

    Gradients are float32 and lie where their parameters lie.
    """
    config, share = work.config, spread(work, mesh)
    stored = stored_params(config, None)
    parameters = sum(each.numbers(mesh) for each in stored)
    stream = share.tokens * config.hidden_size * BF16
    layer = max(_layer(work, mesh, share, kind) for kind in dict.fromkeys(config.layers))
    logits = 3 * share.tokens * _row_of_logits(work, mesh)  # with their softmax and gradient
    backward = 2 * layer + 2 * _gathered(work, mesh)  # values and their gradients
    inputs = len(config.layers) * stream
    return parameters * (FP32 + BF16) + inputs + max(backward, logits)
