"""The compiler's schedule beside the bound of a plan, where one was analyzed."""

import dataclasses

import pytest

from jaxmoe.config import SCOUT
from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.planner import make_plan, notes, to_json
from jaxmoe.plan.scheduled import factors, schedule_factor
from jaxmoe.plan.targets import parse_target
from jaxmoe.plan.text import print_plan
from jaxmoe.plan.work import Work

DECODE = Work(config=SCOUT, context=1_000_000, kv="int8")
TENSOR = MeshConfig(tensor=8)


def plan(target, work=DECODE):
    return make_plan("scout", work, parse_target(target), TENSOR)


def test_decoding_on_tpus_has_the_schedule_beside_the_bound(capsys):
    planned = plan("v5p-16")
    memory = planned.chosen.bounds.memory
    assert memory < planned.scheduled < 1.5 * memory
    assert to_json(planned)["seconds"]["scheduled"] == planned.scheduled
    assert any("not a measurement" in line for line in notes(planned))
    print_plan(planned)
    assert "by the compiler's schedule" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("h100x8", {}),
        ("v5p-16", {"task": "prefill"}),
        ("v5p-16", {"kv": "fp8"}),
        ("v5p-16", {"weights": "int8"}),
    ],
)
def test_what_no_schedule_was_analyzed_of_has_none(target, changes):
    planned = plan(target, dataclasses.replace(DECODE, **changes))
    assert planned.scheduled is None
    assert not any("schedule" in line for line in notes(planned))


def test_the_factor_is_that_of_the_worst_step():
    def step(seconds, kv="int8"):
        return {"kv": kv, "seconds": {"operations": seconds, "between": 0.5, "plan": 10.0}}

    figures = {"steps": [step(11.0), step(12.0), step(8.0, "bf16")]}
    assert factors(figures) == {"int8": 1.25, "bf16": 1.0}
    prefill = step(20.0) | {"tokens": 8192}
    assert factors({"steps": [*figures["steps"], prefill]}) == {"int8": 1.25, "bf16": 1.0}


def test_a_step_that_is_not_fused_has_no_factor():
    rows = dataclasses.replace(DECODE, rows=65)
    assert schedule_factor(rows, TENSOR, parse_target("v5p-16")) is None
    assert schedule_factor(DECODE, TENSOR, parse_target("v5p-16")) >= 1
