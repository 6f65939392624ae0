"""Group metadata: which row each item takes, and dispatch and combine by it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.experts import block_rows, combine, dispatch
from pallas_kernels.experts.group_metadata import rows_of_whole_groups
from pallas_kernels.experts.grouped_mosaic import largest_block
from pallas_kernels.quantized import quantize_matrix
from tests.pallas_kernels.experts.cases import CASES, draw, each, named, planned

TILED = named("blocks of 128, first group empty, some without a group")
every_case = each([*CASES, TILED])


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
    """The order of rows, and so of sums over a group, is the same in every run."""
    rows = np.asarray(planned(case).row_of_item)
    for group in range(case.E):
        assert (np.diff(rows[case.items == group]) > 0).all()


@every_case
def test_dispatch_and_combine_are_transposes(case):
    """<dispatch(x), y> = <x, combine(y)>, and each is the gradient of the other."""
    plan, rng = planned(case), np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-9, 9, (len(case.group), case.D)), jnp.float32)
    y = jnp.asarray(rng.integers(-9, 9, (len(plan.item_of_row), case.D)), jnp.float32)
    rows, to_items = jax.vjp(lambda x: dispatch(plan, x), x)
    items, to_rows = jax.vjp(lambda y: combine(plan, y), y)
    assert np.vdot(rows, y) == np.vdot(x, items)
    np.testing.assert_array_equal(to_items(y)[0], items)
    np.testing.assert_array_equal(to_rows(x)[0], rows)


@every_case
def test_items_come_back_from_their_rows(case):
    plan, x = planned(case), jnp.asarray(draw(case).x)
    placed = (case.items < case.E)[:, None]
    np.testing.assert_array_equal(combine(plan, dispatch(plan, x)), np.where(placed, x, 0))


@pytest.mark.parametrize(
    ("items", "groups", "rows"),
    [(1, 16, 1), (31, 16, 1), (64, 16, 2), (100, 16, 2), (2048, 16, 64), (10**6, 16, 128)],
)
def test_block_is_half_an_average_group(items, groups, rows):
    """With many items, rows without an item are fewer than items."""
    assert block_rows(items, groups) == rows


@pytest.mark.parametrize(
    ("items", "groups", "rows"),
    [(1, 16, 8), (64, 16, 8), (65, 16, 16), (512, 16, 64), (1024, 16, 128), (10**6, 16, 128),
     (1, 1, 8), (9, 1, 16), (64, 1, 64), (65, 1, 128)],
)  # fmt: skip
def test_block_on_hopper_is_twice_an_average_group_or_all_items(monkeypatch, items, groups, rows):
    hopper = dataclasses.make_dataclass("Target", ["is_hopper"])(True)
    monkeypatch.setattr("pallas_kernels.experts.group_metadata.target", lambda: hopper)
    assert block_rows(items, groups) == rows


@pytest.mark.parametrize(
    ("items", "groups", "rows"),
    [(1, 16, 8), (65, 16, 16), (512, 16, 64), (1024, 16, 64), (2047, 16, 64), (2048, 16, 128),
     (10**6, 16, 128), (1, 1, 8), (64, 1, 64), (127, 1, 64), (128, 1, 128)],
)  # fmt: skip
def test_block_on_tpus_is_a_whole_group_of_few_or_an_average_one(monkeypatch, items, groups, rows):
    tpu = dataclasses.make_dataclass("Target", ["is_hopper", "platform"])(False, "tpu")
    monkeypatch.setattr("pallas_kernels.experts.group_metadata.target", lambda: tpu)
    assert block_rows(items, groups) == rows


@pytest.mark.parametrize("items", [64, 200, 512, 1024])
def test_few_groups_have_a_second_block_on_hopper(items):
    """Each block reads its group's matrix: with blocks of half a group, 2.5 for each of them."""
    sizes = np.bincount(np.random.default_rng(0).integers(16, size=items), minlength=16)
    blocks = -(-sizes // rows_of_whole_groups(items, 16))
    assert blocks.sum() <= 1.13 * np.count_nonzero(sizes)


@pytest.mark.parametrize(
    ("format", "widths", "rows"),
    [(None, (512, 256), 128), (None, (512, 640), 64), ("int8", (512, 384), 128),
     ("int8", (512, 320), 64), ("int4", (512, 256), 64)],
)  # fmt: skip
def test_largest_block_reads_matrices_once(format, widths, rows):
    """Catches blocks that a kernel does not serve, or multiplies as two that both read all."""
    w = jnp.zeros((2, *widths), jnp.bfloat16)
    w = w if format is None else quantize_matrix(w, format)
    assert largest_block(w) == rows
