"""The formula for memory agrees with the compiler for absent H100s."""

import dataclasses

import pytest

from jaxmoe.config import PRESETS
from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.compiled import compile_step
from jaxmoe.plan.memory import memory
from jaxmoe.plan.targets import parse_target
from jaxmoe.plan.work import Work
from tests.plan.test_plan_head import SCOUT_HEAD


def two_layers(name, **fields):
    """A local and a global layer, of Maverick a dense and an MoE one."""
    config = dataclasses.replace(PRESETS[name], layers=PRESETS[name].layers[2:4])
    return Work(config=config, context=131072, **fields)


@pytest.mark.absent_gpu
@pytest.mark.parametrize(
    "name, target, mesh, fields",
    [
        ("scout", "h100x8", "tensor=8", {"task": "prefill", "kv": "int8"}),
        ("scout", "h100x8", "tensor=8", {"rows": 8, "head": SCOUT_HEAD}),
        ("scout", "h100x1", "data=1", {"task": "prefill", "weights": "int4", "kv": "int4"}),
        ("maverick", "h200x8", "expert=8", {"task": "prefill", "weights": "fp8"}),
    ],
)
def test_within_five_percent_of_the_compiler(name, target, mesh, fields):
    """The peak is within 5%, and temporaries alone within a third, which a missing phase breaks."""
    work, mesh, target = two_layers(name, **fields), MeshConfig.parse(mesh), parse_target(target)
    formula, compiled = memory(work, mesh), compile_step(work, mesh, target)
    assert (compiled.weights, compiled.cache) == (formula.weights, formula.cache)
    assert formula.peak == pytest.approx(compiled.peak, rel=0.05)
    kept = formula.weights + formula.cache + formula.head
    assert compiled.arguments == pytest.approx(kept, rel=0.005)
    if work.task == "prefill":
        assert formula.temporaries == pytest.approx(compiled.temporaries, rel=1 / 3)
