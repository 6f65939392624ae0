"""The debug check of group_of_block catches values that would make a kernel read out of bounds."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.experts import gated_matmul, grouped_matmul
from pallas_kernels.experts.checks import SWITCH

MISTAKES = {
    "beyond the last": (
        [0, 1, 5],
        r"group_of_block\[2\] is 5; it must be 0 to 2, or 3 for a block",
    ),
    "negative": ([-1, 0, 1], r"group_of_block\[0\] is -1; it must be 0 to 2"),
    "falling": ([0, 2, 1], "group_of_block falls from 2 to 1 at 2; it must ascend"),
}
X, W = jnp.ones((6, 4)), jnp.ones((3, 4, 2))


def multiply(group):
    return grouped_matmul(X, W, group)


def gate(group):
    return gated_matmul(X, W, W, group)


def run(function, groups):
    """Traces and runs a new program, since the switch is read when a program is traced."""
    jax.block_until_ready(jax.jit(lambda group: function(group))(jnp.array(groups)))
    jax.effects_barrier()


@pytest.mark.parametrize("function", [multiply, gate])
@pytest.mark.parametrize(("groups", "says"), MISTAKES.values(), ids=MISTAKES)
def test_overruns_are_caught(monkeypatch, function, groups, says):
    monkeypatch.setenv(SWITCH, "1")
    with pytest.raises(jax.errors.JaxRuntimeError, match=says):
        run(function, groups)


@pytest.mark.parametrize("function", [multiply, gate])
def test_what_is_allowed_passes(monkeypatch, function):
    monkeypatch.setenv(SWITCH, "1")
    for groups in ([0, 1, 2], [0, 0, 3], [3, 3, 3]):
        run(function, groups)


@pytest.mark.parametrize("value", [None, "0", ""])
def test_switched_off(monkeypatch, value):
    """The check leaves no trace in the program."""
    monkeypatch.delenv(SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(SWITCH, value)
    for groups, _ in MISTAKES.values():
        assert "callback" not in str(jax.make_jaxpr(multiply)(jnp.array(groups)))
