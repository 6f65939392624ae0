"""Estimates the time that a decode step spends on launches, which bounds on bytes leave out.

The numbers of operations and all-reduces per layer were counted in programs compiled for eight
H100s (`jaxmoe benchmark schedule`); tests/plan/test_launches.py checks them.
"""

from jaxmoe.mesh import MeshConfig
from jaxmoe.model.decode_step import why_not_sizes
from jaxmoe.plan.share import device_share
from jaxmoe.plan.targets import Target
from jaxmoe.plan.work import Work

# Operations of a layer by its feed-forward, without all-reduces: FEW with the fused kernels of
# `jaxmoe/model/decode_step.py`, MANY without. The SUMS are all-reduces of a layer.
FEW = {"moe": 14, "dense": 9}
MANY = {"moe": 50, "dense": 33}
SUMS_OF_FEW, SUMS_OF_MANY = {"moe": 2, "dense": 2}, {"moe": 3, "dense": 2}
SUMS_OF_SEQUENCE = 3  # all-reduces that merge a global layer's attention over `sequence`
HOPPER = ("h100", "h200")


def launch_seconds(work: Work, mesh: MeshConfig, target: Target) -> float:
    """Seconds of a decode step between operations: launches, and latencies of all-reduces.

    It is 0 for prefill and training, whose steps are much longer, and for targets whose `launch`
    and `latency` are 0.
    """
    if work.task != "decode":
        return 0.0
    few = is_few_launches(work, mesh, target)
    operations, sums = (FEW, SUMS_OF_FEW) if few else (MANY, SUMS_OF_MANY)
    kinds = [kind.feed_forward for kind in work.config.layers]
    seconds = target.launch * sum(operations[kind] for kind in kinds)
    if mesh.tensor * mesh.expert * mesh.fsdp > 1:
        seconds += target.latency * sum(sums[kind] for kind in kinds)
    if mesh.sequence > 1:
        full = sum(spec.mask.span is None for spec in work.config.attention_specs)
        seconds += target.latency * SUMS_OF_SEQUENCE * full
    return seconds


def is_few_launches(work: Work, mesh: MeshConfig, target: Target) -> bool:
    """Whether a decode step is few launches, since Hopper runs it with the fused kernels."""
    return target.compiler in HOPPER and is_fused(work, mesh)


def is_fused(work: Work, mesh: MeshConfig) -> bool:
    """Whether the fused kernels of `jaxmoe/model/decode_step.py` serve a decode step in bf16."""
    share = device_share(work, mesh)
    return (
        work.format is None
        and share.exchange == "replicated"
        and why_not_sizes(work.config, mesh.tensor, share.tokens) is None
    )
