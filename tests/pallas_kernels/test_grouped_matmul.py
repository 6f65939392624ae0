"""Grouped matmul and its plan: every implementation against float64 NumPy on one table of cases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import (
    block_rows,
    combine,
    dispatch,
    grouped_matmul,
    plan_groups,
)

IMPLEMENTATIONS = [pytest.param(grouped_matmul, id="xla")]
D, F = 5, 3


@dataclasses.dataclass(frozen=True)
class Case:
    """The group of each item; E and more mean that the item has none."""

    name: str
    group: list[int]
    E: int
    block: int

    @property
    def items(self):
        return np.array(self.group, np.int32)


def drawn(count, below, seed=0):
    return np.random.default_rng(seed).integers(0, below, count).tolist()


CASES = [
    Case("uneven", drawn(50, 4), 4, 8),
    Case("empty groups", [6, 1, 1, 6, 1, 3, 6, 6, 1], 8, 4),
    Case("first and last group empty", [2, 1, 2, 2, 1], 4, 2),
    Case("all in one group", [2] * 19, 4, 8),
    Case("one item", [3], 4, 8),
    Case("one group", [0] * 10, 1, 4),
    Case("128 groups", drawn(200, 128), 128, 1),
    Case("128 groups, few items", drawn(5, 128), 128, 4),
    Case("some without a group", [4, 0, 5, 3, 0, 99, 4, 1], 4, 2),
    Case("all without a group", [4, 4, 4], 4, 2),
    Case("whole blocks", [0, 1] * 8, 2, 4),
    Case("a block larger than all", drawn(6, 3), 3, 16),
    Case(
        "two experts a token", np.stack([drawn(12, 4), drawn(12, 4, 1)], 1).ravel().tolist(), 4, 4
    ),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def planned(case):
    return jax.jit(plan_groups, static_argnums=(1, 2))(case.items, case.E, case.block)


def draw(case, seed=0):
    """Items, matrices and the cotangent of the items' products."""
    rng, N = np.random.default_rng(seed), len(case.group)
    shapes = (N, D), (case.E, D, F), (N, F)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def judge(case, x, w, dy):
    """Products and both gradients in float64, one item at a time."""
    y, dx, dw = (np.zeros(z.shape) for z in (dy, x, w))
    for i, group in enumerate(case.group):
        if group < case.E:
            matrix, row, cotangent = (z.astype(np.float64) for z in (w[group], x[i], dy[i]))
            y[i], dx[i] = row @ matrix, matrix @ cotangent
            dw[group] += np.outer(row, cotangent)
    return y, dx, dw


def compute(multiply, case, x, w, dy):
    plan = planned(case)

    @jax.jit
    def run(plan, x, w, dy):
        def product(x, w):
            return combine(plan, multiply(dispatch(plan, x), w, plan.group_of_block))

        y, transpose = jax.vjp(product, x, w)
        return y, *transpose(dy)

    return run(plan, x, w, dy)


@every_case
@pytest.mark.parametrize("multiply", IMPLEMENTATIONS)
def test_products_and_gradients(multiply, case):
    arrays = draw(case)
    for got, want in zip(compute(multiply, case, *arrays), judge(case, *arrays), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("multiply", IMPLEMENTATIONS)
def test_matrices_without_rows_are_not_read(multiply):
    """NaN in a matrix shows up as soon as any block is multiplied with it, an empty one too."""
    (case,) = [case for case in CASES if case.name == "empty groups"]
    (x, w, dy), plan = draw(case), planned(case)
    empty = np.setdiff1d(np.arange(case.E), case.group)
    w[empty] = np.nan
    rows, d_rows = (dispatch(plan, jnp.asarray(z)) for z in (x, dy))
    y, transpose = jax.vjp(lambda x, w: multiply(x, w, plan.group_of_block), rows, jnp.asarray(w))
    d_rows, dw = transpose(d_rows)
    assert all(np.isfinite(z).all() for z in (y, d_rows, dw))
    assert not np.asarray(dw)[empty].any()


@pytest.mark.parametrize("multiply", IMPLEMENTATIONS)
def test_sums_are_float32(multiply):
    """A bfloat16 sum of ones stops at 256."""
    x, w = jnp.ones((8, 1000), jnp.bfloat16), jnp.ones((1, 1000, 2), jnp.bfloat16)
    y, transpose = jax.vjp(lambda x, w: multiply(x, w, jnp.zeros(2, jnp.int32)), x, w)
    dx, dw = transpose(y)
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(np.float32), 1000)
    np.testing.assert_array_equal(dx.astype(np.float32), 2000)
    np.testing.assert_array_equal(dw.astype(np.float32), 8000)


@every_case
def test_rows_and_items_are_inverse(case):
    plan, N = planned(case), len(case.group)
    rows = len(plan.item_of_row)
    placed = np.flatnonzero(case.items < case.E)
    used = np.asarray(plan.row_of_item)[placed]
    np.testing.assert_array_equal(np.asarray(plan.item_of_row)[used], placed)
    assert (np.delete(plan.item_of_row, used) == N).all()
    assert (np.delete(plan.row_of_item, placed) == rows).all()


@every_case
def test_a_block_holds_one_group(case):
    plan = planned(case)
    blocks = np.asarray(plan.item_of_row).reshape(len(plan.group_of_block), case.block)
    for items, group in zip(blocks, np.asarray(plan.group_of_block), strict=True):
        real = items[items < len(case.group)]
        assert (case.items[real] == group).all()
        assert (len(real) == 0) == (group == case.E)


@every_case
def test_no_more_rows_than_needed_at_worst(case):
    plan, N = planned(case), len(case.group)
    assert len(plan.item_of_row) <= N + case.E * case.block
    sizes = np.bincount(case.items[case.items < case.E], minlength=case.E)
    np.testing.assert_array_equal(plan.group_sizes, sizes)
    assert (np.asarray(plan.group_of_block) < case.E).sum() == (-(-sizes // case.block)).sum()


@every_case
def test_items_keep_their_order_within_a_group(case):
    """What makes sums over a group, and so the result, the same in every run."""
    rows = np.asarray(planned(case).row_of_item)
    for group in range(case.E):
        assert (np.diff(rows[case.items == group]) > 0).all()


@every_case
def test_dispatch_and_combine_are_transposes(case):
    """<dispatch(x), y> = <x, combine(y)>, and each is the other's gradient."""
    plan, rng = planned(case), np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-9, 9, (len(case.group), D)), jnp.float32)
    y = jnp.asarray(rng.integers(-9, 9, (len(plan.item_of_row), D)), jnp.float32)
    rows, to_items = jax.vjp(lambda x: dispatch(plan, x), x)
    items, to_rows = jax.vjp(lambda y: combine(plan, y), y)
    assert np.vdot(rows, y) == np.vdot(x, items)
    np.testing.assert_array_equal(to_items(y)[0], items)
    np.testing.assert_array_equal(to_rows(x)[0], rows)


@every_case
def test_items_come_back_from_their_rows(case):
    plan, x = planned(case), jnp.asarray(draw(case)[0])
    placed = (case.items < case.E)[:, None]
    np.testing.assert_array_equal(combine(plan, dispatch(plan, x)), np.where(placed, x, 0))


@pytest.mark.parametrize(
    ("items", "groups", "rows"),
    [(1, 16, 1), (31, 16, 1), (64, 16, 2), (100, 16, 2), (2048, 16, 64), (10**6, 16, 128)],
)
def test_block_is_half_an_average_group(items, groups, rows):
    """So that rows without an item are fewer than items, where there are many items."""
    assert block_rows(items, groups) == rows
