"""The collectives of a step: their kinds, the mesh axes they run over, and their bytes.

A decode step's are those of the compiled program, which tests/plan/test_plan_hosts.py compares with
them, but for gathers over `fsdp`, of which XLA merges small ones. Those of prefill and training
are the same sums, exchanges and gathers; no test compares their number.
"""

import dataclasses
import functools

from jaxmoe.config import LayerKind
from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.fused import is_few_launches
from jaxmoe.plan.links import Collective, spread
from jaxmoe.plan.share import DeviceShare, device_share
from jaxmoe.plan.targets import Target
from jaxmoe.plan.training import state_of
from jaxmoe.plan.vision import tower_collectives
from jaxmoe.plan.work import Work, stored_params

ACTIVATION, SUM = 2, 4  # bytes of an element: of activations in bfloat16, of float32 sums
PASSES = 3  # of a training step: forward, recomputed forward, and backward
SUMMED_OVER = ("data", "sequence", "expert")  # axes of tokens; over `fsdp` gradients are scattered
FUSED_ROWS = 8  # the fused kernels of a decode step add up rows in multiples of it
CHOICE = 6  # bytes of an expert's number and weight, which are gathered with a token


@functools.cache
def collectives(
    work: Work, mesh: MeshConfig, target: Target | None = None
) -> tuple[Collective, ...]:
    """The collectives of a step over more than one device.

    Args:
        target: what the devices are; where they are Hopper's, few rows decode by fused kernels.
    """
    share = device_share(work, mesh)
    fused = target is not None and is_few_launches(work, mesh, target)
    found = _of_layers_fused(work, share) if fused else _of_layers(work, share)
    found.append(_all_reduce(("tensor",), share.tokens * work.config.hidden_size * ACTIVATION))
    found += _along_sequence(work, share) + tower_collectives(work, mesh)
    if work.trains:
        found = [dataclasses.replace(x, count=PASSES * x.count) for x in found]
        found += _of_gradients(work, mesh)
    found += _of_weights(work, mesh)
    return tuple(x for x in found if x.count and spread(mesh, x.axes, 1)[0] > 1)


def _all_reduce(axes: tuple[str, ...], nbytes: int, count: int = 1) -> Collective:
    return Collective("all-reduce", axes, nbytes, count)


def _is_moe(kind: LayerKind) -> bool:
    return kind.feed_forward == "moe"


def _of_layers_fused(work: Work, share: DeviceShare) -> list[Collective]:
    """Two sums a layer: of attention, and of the feed-forward with all experts."""
    layers, moe = len(work.config.layers), sum(map(_is_moe, work.config.layers))
    rows = -(-share.tokens // FUSED_ROWS) * FUSED_ROWS
    nbytes = rows * work.config.hidden_size * SUM
    tensor = _all_reduce(("tensor",), nbytes, 2 * layers - moe)
    return [tensor, _all_reduce(("expert", "tensor"), nbytes, moe)]


def _of_layers(work: Work, share: DeviceShare) -> list[Collective]:
    """Sums over `tensor`: attention's, feed-forwards', experts'; and the experts' exchange."""
    layers, moe = len(work.config.layers), sum(map(_is_moe, work.config.layers))
    numbers = share.tokens * work.config.hidden_size
    wide = SUM if work.format is None else ACTIVATION  # kernels round before the sum, XLA after it
    return [
        _all_reduce(("tensor",), numbers * wide, 2 * layers),
        _all_reduce(("tensor",), numbers * ACTIVATION, moe),
        *_of_experts(work, share, moe),
    ]


def _of_experts(work: Work, share: DeviceShare, moe: int) -> list[Collective]:
    """How tokens reach their experts on other devices, and come back."""
    copies, D = work.config.num_experts_per_tok, work.config.hidden_size
    if share.exchange == "all_to_all":
        nbytes = share.tokens * copies * D * ACTIVATION
        return [Collective("all-to-all", ("expert",), nbytes, 2 * moe)]
    nbytes = share.group * D * ACTIVATION
    if share.exchange == "replicated":
        return [_all_reduce(("expert",), nbytes, moe)]
    with_choices = nbytes + share.group * copies * CHOICE
    return [
        Collective("all-gather", ("expert",), with_choices, moe),
        Collective("reduce-scatter", ("expert",), nbytes, moe),
    ]


def _along_sequence(work: Work, share: DeviceShare) -> list[Collective]:
    """What attention sends over `sequence`.

    New keys and values are gathered; in global layers queries are gathered too, and their float32
    results merged. Local layers send nothing if every device holds whole chunks.
    """
    d, tokens, axes = work.config.head_dim, share.rows * work.tokens, ("sequence",)
    masks = [spec.mask for spec in work.config.attention_specs]
    everywhere = sum(mask.span is None for mask in masks)
    queries = tokens * share.heads
    if share.length == work.tokens:  # not split: decoding, whose results alone are merged
        if work.trains:
            return []
        maxima = _all_reduce(axes, queries * SUM, everywhere)
        return [maxima, _all_reduce(axes, queries * (d + 1) * SUM, everywhere)]
    keys = sum(
        mask.span is None or not (mask.block_diagonal and share.length % mask.span == 0)
        for mask in masks
    )
    found = [Collective("all-gather", axes, 2 * tokens * share.kv_heads * d * ACTIVATION, keys)]
    if not work.trains:  # in training each device has all keys of its queries
        found.append(Collective("all-gather", axes, queries * d * ACTIVATION, everywhere))
        found.append(Collective("reduce-scatter", axes, queries * d * SUM, everywhere))
    return found


def _of_weights(work: Work, mesh: MeshConfig) -> list[Collective]:
    """The gathering of weights over `fsdp` at each use."""
    at_use, times = dataclasses.replace(mesh, fsdp=1), PASSES if work.trains else 1
    return [
        Collective("all-gather", ("fsdp",), x.nbytes(at_use) // x.count, times * x.count)
        for x in stored_params(work.config, work.format)
        if "embed" in x.axes and not x.is_vision
    ]


def _of_gradients(work: Work, mesh: MeshConfig) -> list[Collective]:
    """The sums of gradients over the devices with other tokens."""
    found = []
    for x, count in state_of(work).trained.items():
        divided = {axis for axes in x.axes for axis in axes}
        others = tuple(axis for axis in SUMMED_OVER if axis not in divided)
        found.append(_all_reduce(others, x.size(mesh) * ACTIVATION, count))
    return found
