"""Lower bounds of a step's time, from the bytes and operations that it cannot avoid.

They are bounds and not forecasts: every byte is moved once, every operation runs at the published
rate, and memory, compute and communication overlap completely (a roofline model).
"""

import dataclasses
import math

import numpy as np

from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.collectives import collectives
from jaxmoe.plan.links import Collective
from jaxmoe.plan.share import DeviceShare, device_share
from jaxmoe.plan.targets import Target
from jaxmoe.plan.training import numbers, state_of
from jaxmoe.plan.vision import tower_flops, tower_reads
from jaxmoe.plan.work import Work, cache_bytes, stored_params

ACTIVATION = 2  # bytes of an element of activations, bfloat16
# A training step with recomputed layers runs the forward pass twice. The backward pass has a
# product for each of the forward pass, and another where the matrix is trained.
PASSES = {"train": 4, "lora": 3}
WEIGHT_READS = 3  # forward, recomputed and backward
OPTIMIZER_BYTES = 32  # per parameter: read and write float32 weight, gradient and two moments


@dataclasses.dataclass(frozen=True)
class Demand:
    """What one device must move and compute in a step.

    Attributes:
        weights: bytes of weights read from memory.
        cache: bytes of the KV cache read from memory.
        flops: floating-point operations.
        collectives: what it exchanges with other devices.
        mesh: all of them.
    """

    weights: float
    cache: float
    flops: float
    collectives: tuple[Collective, ...]
    mesh: MeshConfig

    def sent(self, devices_a_host: int | None = None) -> tuple[float, float]:
        """Bytes sent to devices of the same host, and of others; None is one host of them all."""
        sent = [x.sent(self.mesh, devices_a_host) for x in self.collectives]
        return math.fsum(inside for inside, _ in sent), math.fsum(outside for _, outside in sent)


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
        math.fsum(x.seconds(demand.mesh, target) for x in demand.collectives),
    )


def demand(work: Work, mesh: MeshConfig, target: Target | None = None) -> Demand:
    """What the busiest device of the mesh must move and compute in one step.

    Args:
        target: as of `jaxmoe.plan.collectives.collectives`.
    """
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
        collectives=collectives(work, mesh, target),
        mesh=mesh,
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
