"""How many operations and sums over devices a decode step is, which a bound on bytes leaves out.

Counted in programs compiled for eight H100s (`jaxmoe benchmark schedule`); as a test checks.
"""

from jaxmoe.mesh import MeshConfig
from jaxmoe.model.decode_step import why_not_sizes
from jaxmoe.plan.spread import spread
from jaxmoe.plan.targets import Target
from jaxmoe.plan.work import Work

# Of a layer without its sums: by the kernels of `jaxmoe/model/decode_step.py`, and otherwise.
FEW = {"moe": 14, "dense": 9}
MANY = {"moe": 50, "dense": 33}
SUMS_OF_FEW, SUMS_OF_MANY = {"moe": 2, "dense": 2}, {"moe": 3, "dense": 2}
SUMS_OF_SEQUENCE = 3  # that put a global layer's attention together
HOPPER = ("h100", "h200")


def launch_seconds(work: Work, mesh: MeshConfig, target: Target) -> float:
    """Seconds that the layers' operations of a decode step wait for one another.

    0 for other steps, which are long beside it, and for targets that say no times.
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
        logs = sum(kind.attention == "global" for kind in work.config.layers)
        seconds += target.latency * SUMS_OF_SEQUENCE * logs
    return seconds


def is_few_launches(work: Work, mesh: MeshConfig, target: Target) -> bool:
    """Whether a decode step runs by the kernels of `jaxmoe/model/decode_step.py`."""
    share = spread(work, mesh)
    return (
        target.compiler in HOPPER
        and work.format is None
        and share.way == "stay"
        and why_not_sizes(work.config, mesh.tensor, share.tokens) is None
    )
