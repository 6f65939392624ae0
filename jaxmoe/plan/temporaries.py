"""Computes a step's temporary memory on one device, in bytes, by formula.

Layers run one after the other, so that the layer with the largest temporaries decides. They grow
neither with the number of layers nor with the cache, which is updated in place. The formula is
checked against the compiler for H100 in tests/plan/test_plan_compiled.py.

Shape letters: T tokens, D embed, F feed-forward width, R rows of the experts' blocks.
"""

import collections
import dataclasses
import math

from jaxmoe.config import LayerKind
from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.share import DeviceShare, device_share
from jaxmoe.plan.work import Work, stored_params
from jaxmoe.train.cross_entropy import chunk_size
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
    return logits + max(layer + _gathered(work, mesh), padded * _row_of_logits(work, mesh))


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
    return max(layer + _gathered(work, mesh), SEARCHED * rows * _row_of_logits(work, mesh))


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


def _gathered(work: Work, mesh: MeshConfig) -> int:
    """Bytes of one layer's weights after gathering them over fsdp; gate and up are held twice."""
    if mesh.fsdp == 1:
        return 0
    at_use = dataclasses.replace(mesh, fsdp=1)
    by_layer: collections.Counter[str] = collections.Counter()
    for stored in stored_params(work.config, work.format):
        parts = stored.name.split(".")
        copies = 2 if parts[-1].split("[")[0] in ("gate", "up") else 1
        if "embed" in stored.axes and not stored.is_vision:
            layer = ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
            by_layer[layer] += copies * stored.nbytes(at_use) // stored.count
    return max(by_layer.values())


def _row_of_logits(work: Work, mesh: MeshConfig) -> int:
    return math.ceil(work.config.vocab_size / mesh.tensor) * FP32


def training_temporaries(work: Work, mesh: MeshConfig) -> int:
    """Bytes of temporaries of a training step with recomputed layers.

    They are float32 gradients and bfloat16 weights, both sharded as the parameters; the input of
    every layer; and the backward pass of one layer or of the loss, whichever is larger. The loss
    keeps a float32 gradient of the last hidden states and a chunk of logits, as
    `jaxmoe.train.cross_entropy` makes them.
    """
    config, share = work.config, device_share(work, mesh)
    stored = stored_params(config, None)
    parameters = sum(x.numbers(mesh) for x in stored)
    stream = share.tokens * config.hidden_size * BF16
    layer = max(_layer(work, mesh, share, kind) for kind in dict.fromkeys(config.layers))
    width = chunk_size(config.vocab_size // mesh.tensor, share.tokens, config.hidden_size)
    # A gradient of the last hidden states; logits of a chunk, their softmax and gradient.
    loss = share.tokens * (config.hidden_size + 3 * width) * FP32
    backward = 2 * layer + 2 * _gathered(work, mesh)  # values and gradients
    inputs = len(config.layers) * stream
    return parameters * (FP32 + BF16) + inputs + max(backward, loss)
