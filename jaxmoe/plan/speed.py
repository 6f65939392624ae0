"""What a step must move and compute, and the time that this takes at least.

Bounds, not forecasts: every byte once, every operation at the full rate, all at the same time.
"""

import dataclasses

import numpy as np

from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.spread import Spread, spread
from jaxmoe.plan.targets import Target
from jaxmoe.plan.work import Work, cache_bytes, stored_params

ACTIVATION = 2  # bytes: bfloat16
# A training step computes layers twice forward (the second time for the backward pass), and the
# backward pass is two products for each of the forward pass.
PASSES, WEIGHT_READS = 4, 3
OPTIMIZER_BYTES = 32  # of a parameter: itself and two moments read and written, its gradient too


@dataclasses.dataclass(frozen=True)
class Demand:
    """One device's share of a step.

    Attributes:
        weights, cache: bytes read.
        flops: operations.
        sent: bytes to other devices.
    """

    weights: float
    cache: float
    flops: float
    sent: float


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds that a step takes at least, by what it waits for."""

    memory: float
    compute: float
    communication: float

    @property
    def binds(self) -> str:
        """The name of the largest."""
        seconds = dataclasses.asdict(self)
        return max(seconds, key=lambda name: seconds[name])

    @property
    def seconds(self) -> float:
        """The largest."""
        return max(dataclasses.astuple(self))

    @property
    def total(self) -> float:
        """As if nothing overlapped: tells equal bounds apart."""
        return sum(dataclasses.astuple(self))


def bounds(target: Target, demand: Demand) -> Bounds:
    """At the target's published rates."""
    return Bounds(
        (demand.weights + demand.cache) / target.bandwidth,
        demand.flops / target.flops,
        demand.sent / target.interconnect,
    )


def demand(work: Work, mesh: MeshConfig) -> Demand:
    """Of one step on the busiest device."""
    share = spread(work, mesh)
    training = work.task == "train"
    weights = _weights_read(work, mesh, share) * (WEIGHT_READS if training else 1)
    if training:
        stored = stored_params(work.config, work.format)
        weights += OPTIMIZER_BYTES * sum(each.numbers(mesh) for each in stored)
    flops = float(_matmul_flops(work, mesh, share) + _attention_flops(work, mesh, share))
    return Demand(
        weights=weights,
        cache=0.0 if training else float(cache_bytes(work, mesh)),
        flops=flops * (PASSES if training else 1),
        sent=_sent(work, mesh, share),
    )


def _weights_read(work: Work, mesh: MeshConfig, share: Spread) -> float:
    """Whole matrices, gathered over fsdp; of the embeddings the tokens' rows, of experts some."""
    at_use = dataclasses.replace(mesh, fsdp=1)
    total = float(share.tokens * work.config.hidden_size * ACTIVATION)
    for each in stored_params(work.config, work.format):
        if each.name == "embed" and not work.config.tie_word_embeddings:
            continue
        total += each.nbytes(at_use) * (_touched(work, mesh, share) if each.is_expert else 1)
    return total


def _touched(work: Work, mesh: MeshConfig, share: Spread) -> float:
    """The part of its experts that the busiest device reads, where tokens choose evenly."""
    E, k = work.config.num_local_experts, work.config.num_experts_per_tok
    distinct = E * (1 - (1 - k / E) ** share.group)
    return max(1.0, distinct / mesh.expert) / (E / mesh.expert)


def _matmul_flops(work: Work, mesh: MeshConfig, share: Spread) -> float:
    config, at_use = work.config, dataclasses.replace(mesh, fsdp=1)
    per_expert = share.group * config.num_experts_per_tok / max(1, config.num_local_experts)
    head = "embed" if config.tie_word_embeddings else "lm_head"
    last = share.tokens if work.task == "train" else share.rows
    total = 0.0
    for each in stored_params(config, work.format):
        if each.name.endswith(".scale") or (each.name == "embed" and head != "embed"):
            continue
        uses = per_expert if each.is_expert else last if each.name == head else share.tokens
        total += 2 * each.numbers(at_use) * uses
    return total


def _attention_flops(work: Work, mesh: MeshConfig, share: Spread) -> float:
    """Two products for each pair of a query and a key that its mask leaves."""
    position = np.arange(work.context - work.tokens, work.context, dtype=np.float64)
    chunk = work.config.attention_chunk_size or work.context
    pairs = {
        "global": (position + 1).sum() / mesh.sequence,
        "local": (position % chunk + 1).sum() * share.length / work.tokens,
    }
    by_layer = sum(pairs[kind.attention] for kind in work.config.layers)
    return 4.0 * share.rows * share.heads * work.config.head_dim * by_layer


def _sent(work: Work, mesh: MeshConfig, share: Spread) -> float:
    """Of ring collectives: an all-reduce sends 2 (n - 1) / n of its array, others half of that."""
    config = work.config
    moe = sum(kind.feed_forward == "moe" for kind in config.layers)
    wide = 4 if work.format is None else ACTIVATION  # kernels round before the sum, XLA after it
    # Attention and feed-forward; the experts and the embeddings.
    nbytes = 2 * len(config.layers) * wide + (moe + 1) * ACTIVATION
    sent = 2 * _part(mesh.tensor) * share.tokens * config.hidden_size * nbytes
    sent += moe * _sent_to_experts(work, mesh, share)
    sent += _sent_along_sequence(work, mesh, share)
    sent *= 3 if work.task == "train" else 1  # forward, again, and backward
    return sent + _sent_weights(work, mesh)


def _part(devices: int) -> float:
    return (devices - 1) / devices


def _sent_to_experts(work: Work, mesh: MeshConfig, share: Spread) -> float:
    """In one layer: all-reduced, gathered and scattered, or sent there and back."""
    copies = work.config.num_experts_per_tok if share.way == "exchange" else 1
    tokens = share.tokens if share.way == "exchange" else share.group
    return 2 * _part(mesh.expert) * tokens * copies * work.config.hidden_size * ACTIVATION


def _sent_along_sequence(work: Work, mesh: MeshConfig, share: Spread) -> float:
    """Keys and values to all; on global layers also queries, and float32 results merged.

    On local layers nothing, where devices hold whole chunks.
    """
    d, tokens = work.config.head_dim, share.rows * work.tokens
    is_split = share.length < work.tokens
    keys = 2 * share.kv_heads * ACTIVATION if is_split else 0
    queries = (ACTIVATION + 4 if is_split else 2 * 4) * share.heads
    if work.task == "train":
        queries = 0  # each device has all keys of its queries
    layers = [kind.attention for kind in work.config.layers]
    apart = share.length % (work.config.attention_chunk_size or work.context) == 0
    numbers = layers.count("global") * (keys + queries)
    numbers += 0 if apart else layers.count("local") * keys
    return _part(mesh.sequence) * tokens * d * numbers


def _sent_weights(work: Work, mesh: MeshConfig) -> float:
    """Gathered over fsdp at each use; in training gradients are summed over rows and tokens."""
    at_use = dataclasses.replace(mesh, fsdp=1)
    stored = stored_params(work.config, work.format)
    training = work.task == "train"
    gathered = sum(each.nbytes(at_use) - each.nbytes(mesh) for each in stored)
    sent = float(gathered) * (3 if training else 1)
    if training:
        for each in stored:
            copies = mesh.data * mesh.sequence * (1 if each.is_expert else mesh.expert)
            sent += 2 * _part(copies) * each.numbers(mesh) * 4
    return sent
