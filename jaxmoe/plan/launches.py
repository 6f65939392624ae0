"""Estimates the time that a decode step spends on launches, which bounds on bytes leave out.

The numbers of operations per layer were counted in programs compiled for eight H100s (`jaxmoe
benchmark schedule`); tests/plan/test_launches.py checks them.
"""

import math

from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.collectives import collectives
from jaxmoe.plan.fused import is_few_launches
from jaxmoe.plan.targets import Target
from jaxmoe.plan.work import Work

# Operations of a layer by its feed-forward, without collectives: FEW with the fused kernels of
# `jaxmoe/model/decode_step.py`, MANY without.
FEW = {"moe": 14, "dense": 9}
MANY = {"moe": 50, "dense": 33}


def launch_seconds(work: Work, mesh: MeshConfig, target: Target) -> float:
    """Seconds of a decode step between operations: launches, and latencies of collectives.

    It is 0 for prefill and training, whose steps are much longer, and for targets whose `launch`
    and latencies are 0.
    """
    if work.task != "decode":
        return 0.0
    operations = FEW if is_few_launches(work, mesh, target) else MANY
    launches = sum(operations[kind.feed_forward] for kind in work.config.layers)
    waits = math.fsum(x.latency(mesh, target) for x in collectives(work, mesh, target))
    return target.launch * launches + waits
