"""Estimates a decode step on TPUs by the compiler's schedule of the kernels that it runs.

`schedule.json` has, by generation of TPUs and format of the cache, how many times their bound on
memory the steps of `jaxmoe benchmark schedule` take. `scripts/tables.py` writes it.
"""

import json
from pathlib import Path
from typing import Any

from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.fused import is_fused
from jaxmoe.plan.targets import Target
from jaxmoe.plan.work import Work

FILE = Path(__file__).with_name("schedule.json")


def schedule_factor(work: Work, mesh: MeshConfig, target: Target) -> float | None:
    """How many times its bound on memory a step takes by the compiler's schedule.

    It is None where no schedule was analyzed: for steps other than decoding with the fused kernels,
    quantized weights, and other targets or formats of the cache.
    """
    generation, _, _ = str(target.compiler).partition(":")
    factors = json.loads(FILE.read_text()).get(generation, {})
    served = work.task == "decode" and is_fused(work, mesh)
    return factors.get(work.kv) if served else None


def factors(figures: dict[str, Any]) -> dict[str, float]:
    """The factor of each format of the cache, of the decode step furthest from its bound.

    Args:
        figures: those of `jaxmoe benchmark schedule` for a TPU.
    """
    found: dict[str, float] = {}
    for step in (x for x in figures["steps"] if x.get("tokens", 1) == 1):
        seconds = step["seconds"]
        factor = (seconds["operations"] + seconds["between"]) / seconds["plan"]
        found[step["kv"]] = max(found.get(step["kv"], 1.0), round(factor, 3))
    return found
