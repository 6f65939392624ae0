"""How many operations a decode step is, by the program compiled for eight H100s that are not there."""

import pytest
from _schedule_steps import PERIOD, Step

from jaxmoe.plan.operations import count_kinds, entry_operations, of_layer

MOST = {"moe": 20, "dense": 12}  # operations of a layer
HOST_WAITS = "sort", "while", "conditional"  # what a CUDA graph does not hold, or not well

pytestmark = pytest.mark.absent_gpu


@pytest.mark.parametrize(("model", "rows"), [("scout", 1), ("scout", 64), ("maverick", 1)])
def test_a_layer_is_few_launches(model, rows):
    """Catches an operation that XLA makes many of, and sums over devices that could be one."""
    step = Step(model, rows)
    operations = entry_operations(step.compiled("h100", 2 * PERIOD))
    layers = range(PERIOD, 2 * PERIOD)  # the first ones have what all layers share
    for layer, kind in ((i, step.config.layers[i]) for i in layers):
        kinds = count_kinds(of_layer(operations, layer))
        assert kinds["custom-call"] >= 9, "the layer's kernels were not found"
        assert kinds.total() <= MOST[kind.feed_forward], kinds
        assert kinds["all-reduce"] <= 2
    assert not {each.kind for each in operations} & set(HOST_WAITS)
