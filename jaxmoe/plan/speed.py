"""Lower bounds of a step's time, from the bytes and operations that it cannot avoid.

They are bounds and not forecasts: every byte is moved once, every operation runs at the published
rate, and memory, compute and communication overlap completely (a roofline model).
"""

import dataclasses
import math

import numpy as np

from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.share import DeviceShare, device_share
from jaxmoe.plan.targets import Target
from jaxmoe.plan.training import numbers, state_of
from jaxmoe.plan.vision import tower_flops, tower_reads, tower_sent
from jaxmoe.plan.work import Work, cache_bytes, stored_params

ACTIVATION = 2  # bytes of an element of activations, bfloat16
# A training step with recomputed layers runs the forward pass twice. The backward pass has a
# product for each of the forward pass, and another where the matrix is trained.
PASSES = {"train": 4, "lora": 3}
WEIGHT_READS = 3  # forward, recomputed and backward
SUMMED_OVER = ("data", "sequence", "expert")  # axes of tokens; over `fsdp` gradients are scattered
GRADIENT = 2  # bytes of an element of a gradient, which has the dtype of computation
OPTIMIZER_BYTES = 32  # per parameter: read and write float32 weight, gradient and two moments


@dataclasses.dataclass(frozen=True)
class Demand:
    """What one device must move and compute in a step.

    Attributes:
        weights: bytes of weights read from memory.
        cache: bytes of the KV cache read from memory.
        flops: floating-point operations.
        sent: bytes sent to other devices.
    """

    weights: float
    cache: float
    flops: float
    sent: float


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Lower bounds of a step's seconds, by resource."""

    memory: float
    compute: float
    communication: float

    @property
    def binds(self) -> str:
        """The name of the resource with the largest bound."""
        seconds = dataclasses.asdict(self)
        return max(seconds, key=lambda name: seconds[name])

    @property
    def seconds(self) -> float:
        """The largest bound: the least time that a step takes."""
        return max(dataclasses.astuple(self))

    @property
    def total(self) -> float:
        """The sum of the bounds, a tie-breaker between meshes with equal largest bounds."""
        return sum(dataclasses.astuple(self))


def bounds(target: Target, demand: Demand) -> Bounds:
    """The bounds of a demand at the target's published rates."""
    return Bounds(
        (demand.weights + demand.cache) / target.bandwidth,
        demand.flops / target.flops,
        demand.sent / target.interconnect,
    )


def demand(work: Work, mesh: MeshConfig) -> Demand:
    """What the busiest device of the mesh must move and compute in one step."""
    share = device_share(work, mesh)
    weights = _weights_read(work, mesh, share) * (WEIGHT_READS if work.trains else 1)
    if work.trains:
        weights += OPTIMIZER_BYTES * numbers(state_of(work).trained, mesh)
    flops = float(_matmul_flops(work, mesh, share) + attention_flops(work, mesh, share))
    flops += tower_flops(work, mesh)
    return Demand(
        weights=weights,
        cache=0.0 if work.trains else float(cache_bytes(work, mesh)),
        flops=flops * PASSES.get(work.task, 1),
        sent=_sent(work, mesh, share),
    )


def _weights_read(work: Work, mesh: MeshConfig, share: DeviceShare) -> float:
    """Bytes of weights that a device reads: embedding rows, busy experts, all other matrices.

    Matrices that are sharded over fsdp are read whole, after they were gathered.
    """
    at_use = dataclasses.replace(mesh, fsdp=1)
    total = float(share.tokens * work.config.hidden_size * ACTIVATION)  # rows of the embedding
    total += tower_reads(work, mesh)
    for stored in stored_params(work.config, work.format):
        embeds = stored.name == "embed" and not work.config.tie_word_embeddings
        if embeds or stored.is_vision:
            continue
        part = busy_experts(work, mesh, share) if stored.is_expert else 1
        total += stored.nbytes(at_use) * part
    return total


def busy_experts(work: Work, mesh: MeshConfig, share: DeviceShare) -> float:
    """The fraction of its experts that the busiest device reads, if tokens choose uniformly."""
    E, k = work.config.num_local_experts, work.config.num_experts_per_tok
    distinct = E * (1 - (1 - k / E) ** share.group)
    return max(1.0, distinct / mesh.expert) / (E / mesh.expert)


def _matmul_flops(work: Work, mesh: MeshConfig, share: DeviceShare) -> float:
    """Operations of all products with weights: two for each parameter and token."""
    config, at_use = work.config, dataclasses.replace(mesh, fsdp=1)
    per_expert = share.group * config.num_experts_per_tok / max(1, config.num_local_experts)
    head = "embed" if config.tie_word_embeddings else "lm_head"
    last = share.tokens if work.trains else share.rows
    total = 0.0
    for stored in stored_params(config, work.format):
        embeds = stored.name == "embed" and head != "embed"
        if stored.name.endswith(".scale") or embeds or stored.is_vision:
            continue
        uses = per_expert if stored.is_expert else last if stored.name == head else share.tokens
        total += 2 * stored.numbers(at_use) * uses
    return total


def attention_flops(work: Work, mesh: MeshConfig, share: DeviceShare) -> float:
    """Operations of attention: two products for each query and each key that it sees."""
    position = np.arange(work.context - work.tokens, work.context, dtype=np.float64)
    pairs = {}
    for mask in {spec.mask for spec in work.config.attention_specs}:
        if mask.span is None:
            pairs[mask] = (position + 1).sum() / mesh.sequence
        else:
            seen = np.minimum(position - mask.first(position), position) + 1
            pairs[mask] = seen.sum() * share.length / work.tokens
    by_layer = sum(pairs[spec.mask] for spec in work.config.attention_specs)
    return 4.0 * share.rows * share.heads * work.config.head_dim * by_layer


def _sent(work: Work, mesh: MeshConfig, share: DeviceShare) -> float:
    """Bytes that a device sends in a step, by ring collectives over n devices.

    An all-reduce sends 2 (n - 1) / n of its array, all-gather and reduce-scatter half of that.
    """
    config = work.config
    moe = sum(kind.feed_forward == "moe" for kind in config.layers)
    wide = 4 if work.format is None else ACTIVATION  # kernels round before the sum, XLA after it
    # All-reduces over `tensor`: attention and feed-forward, then experts and the embedding.
    nbytes = 2 * len(config.layers) * wide + (moe + 1) * ACTIVATION
    sent = 2 * _part(mesh.tensor) * share.tokens * config.hidden_size * nbytes
    sent += moe * _sent_to_experts(work, mesh, share)
    sent += _sent_along_sequence(work, mesh, share) + tower_sent(work, mesh)
    sent *= 3 if work.trains else 1  # forward, recomputed forward, and backward
    return sent + _sent_weights(work, mesh)


def _part(devices: int) -> float:
    return (devices - 1) / devices


def _sent_to_experts(work: Work, mesh: MeshConfig, share: DeviceShare) -> float:
    """Bytes that one MoE layer sends over the `expert` axis.

    They are those of an all-reduce, of an all-gather and a reduce-scatter, or of two all-to-alls.
    """
    copies = work.config.num_experts_per_tok if share.exchange == "all_to_all" else 1
    tokens = share.tokens if share.exchange == "all_to_all" else share.group
    return 2 * _part(mesh.expert) * tokens * copies * work.config.hidden_size * ACTIVATION


def _sent_along_sequence(work: Work, mesh: MeshConfig, share: DeviceShare) -> float:
    """Bytes that attention sends over the `sequence` axis in all layers.

    New keys and values are gathered; in global layers queries are gathered too, and their float32
    results merged. Local layers send nothing if every device holds whole chunks.
    """
    d, tokens = work.config.head_dim, share.rows * work.tokens
    is_split = share.length < work.tokens
    keys = 2 * share.kv_heads * ACTIVATION if is_split else 0
    queries = (ACTIVATION + 4 if is_split else 2 * 4) * share.heads
    if work.trains:
        queries = 0  # each device has all keys of its queries
    masks = [spec.mask for spec in work.config.attention_specs]
    numbers = sum(mask.span is None for mask in masks) * (keys + queries)
    numbers += keys * sum(
        mask.span is not None and not (mask.block_diagonal and share.length % mask.span == 0)
        for mask in masks
    )
    return _part(mesh.sequence) * tokens * d * numbers


def _sent_weights(work: Work, mesh: MeshConfig) -> float:
    """Bytes of weights gathered over fsdp at each use, and in training of gradients reduced."""
    at_use = dataclasses.replace(mesh, fsdp=1)
    stored = [x for x in stored_params(work.config, work.format) if not x.is_vision]
    sent = float(sum(x.nbytes(at_use) - x.nbytes(mesh) for x in stored))
    return 3 * sent + _sent_gradients(work, mesh) if work.trains else sent


def _sent_gradients(work: Work, mesh: MeshConfig) -> float:
    """Bytes of the all-reduces of gradients over the devices with other tokens."""
    sizes, sent = dataclasses.asdict(mesh), 0.0
    for x, count in state_of(work).trained.items():
        divided = {axis for axes in x.axes for axis in axes}
        others = math.prod(sizes[axis] for axis in SUMMED_OVER if axis not in divided)
        sent += 2 * _part(others) * count * x.size(mesh) * GRADIENT
    return sent
