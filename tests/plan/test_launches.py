"""Operations of a decode step, counted in programs compiled for eight absent H100s."""

import pytest

from jaxmoe.benchmarks.schedule.steps import PERIOD, Step
from jaxmoe.config import SCOUT
from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.fused import is_few_launches
from jaxmoe.plan.launches import FEW, launch_seconds
from jaxmoe.plan.operations import count_kinds, entry_operations, of_layer
from jaxmoe.plan.targets import parse_target
from jaxmoe.plan.work import Work

MOST = {"moe": 20, "dense": 12}  # the most operations of a layer, by its feed-forward
HOST_WAITS = "sort", "while", "conditional"  # operations that CUDA graphs do not hold, or not well


@pytest.mark.absent_gpu
@pytest.mark.parametrize(("model", "rows"), [("scout", 64), ("maverick", 1)])
def test_a_layer_is_few_launches(model, rows):
    """Catches operations that XLA splits into many, and all-reduces that could be merged."""
    step = Step(model, rows)
    operations = entry_operations(step.compiled("h100", 2 * PERIOD))
    layers = range(PERIOD, 2 * PERIOD)  # beyond the first period, which has the shared work
    for layer, kind in ((i, step.config.layers[i]) for i in layers):
        kinds = count_kinds(of_layer(operations, layer))
        assert kinds["custom-call"] >= 9, "the layer's kernels were not found"
        assert kinds.total() <= MOST[kind.feed_forward], kinds
        assert kinds["all-reduce"] == 2
        assert abs(kinds.total() - kinds["all-reduce"] - FEW[kind.feed_forward]) <= 1
    assert not {each.kind for each in operations} & set(HOST_WAITS)


H100X8, TENSOR = parse_target("h100x8"), MeshConfig(tensor=8)


def test_a_plan_knows_launches_and_sums():
    """48 layers have 14 operations and two all-reduces each, and the embedding has one."""
    work = Work(config=SCOUT)
    expected = 48 * (14 * H100X8.launch + 2 * H100X8.latency) + H100X8.latency
    assert launch_seconds(work, TENSOR, H100X8) == pytest.approx(expected)
    one = launch_seconds(work, MeshConfig(), parse_target("h100x1"))
    assert one == pytest.approx(48 * 14 * H100X8.launch)
    assert launch_seconds(work, MeshConfig(tensor=8), parse_target("v5p-16")) == 0
    logs = launch_seconds(work, MeshConfig(sequence=8), H100X8) - one
    assert logs == pytest.approx(12 * 2 * H100X8.latency)
    assert launch_seconds(Work(config=SCOUT, task="prefill"), TENSOR, H100X8) == 0


@pytest.mark.parametrize(
    ("changes", "mesh", "target"),
    [
        ({"rows": 65}, TENSOR, "h100x8"),
        ({"weights": "int8"}, TENSOR, "h100x8"),
        ({"rows": 8}, MeshConfig(expert=8), "h100x8"),  # tokens are gathered
        ({}, TENSOR, "b200x8"),
    ],
)
def test_other_steps_are_many_launches(changes, mesh, target):
    work = Work(config=SCOUT, **changes)
    assert not is_few_launches(work, mesh, parse_target(target))
    assert is_few_launches(Work(config=SCOUT, rows=64), TENSOR, H100X8)
