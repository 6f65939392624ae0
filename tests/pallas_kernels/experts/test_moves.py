"""dispatch and combine are exact, except for the rounding of the sum with shared rows."""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.experts import combine, dispatch, move_implementation, moves, moves_mosaic
from tests.pallas_kernels.experts.cases import CASES, named, planned
from tests.pallas_kernels.hopper import INTERPRET, no_races

TILED = named("blocks of 128, first group empty, some without a group")
XLA = (("implementation", "xla"),)
GPU = (
    ("implementation", "mosaic_gpu"),
    ("interpret", INTERPRET),
)
ALL_CASES = [*CASES, TILED]
FEW = [CASES[0], named("one item"), named("some without a group")]


class Results(NamedTuple):
    rows: np.ndarray
    dx: np.ndarray
    items: np.ndarray
    dy: np.ndarray
    summed: np.ndarray  # with the shared rows
    dy_summed: np.ndarray
    d_shared: np.ndarray


class Arrays(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    shared: np.ndarray
    d_rows: np.ndarray
    d_items: np.ndarray


def draw(case, dtype, width):
    """Random arrays; rows without an item are NaN, so that any use of them shows."""
    plan, rng = planned(case), np.random.default_rng(0)
    N, R = len(plan.row_of_item), len(plan.item_of_row)
    arrays = Arrays(
        *(rng.standard_normal((count, width)).astype(jnp.dtype(dtype)) for count in (N, R, N, R, N))
    )
    unused = np.asarray(plan.item_of_row) == N
    arrays.y[unused] = arrays.d_rows[unused] = np.nan
    return plan, arrays


def judge(plan, arrays: Arrays) -> Results:
    """The reference results, computed one item at a time."""
    x, y, shared, d_rows, d_items = (np.asarray(z) for z in arrays)
    rows, dy = np.zeros_like(y), np.zeros_like(y)
    items, dx = np.zeros_like(x), np.zeros_like(x)
    for item, row in enumerate(np.asarray(plan.row_of_item)):
        if row < len(y):
            rows[row], dy[row] = x[item], d_items[item]
            items[item], dx[item] = y[row], d_rows[row]
    summed = (items.astype(np.float32) + shared.astype(np.float32)).astype(x.dtype)
    return Results(rows, dx, items, dy, summed, dy, d_items)


@functools.partial(jax.jit, static_argnums=0)
def moved(options, plan, arrays):
    go, back = (functools.partial(move, plan, **dict(options)) for move in (dispatch, combine))
    rows, to_x = jax.vjp(go, arrays.x)
    items, to_y = jax.vjp(back, arrays.y)
    summed, to_both = jax.vjp(back, arrays.y, arrays.shared)
    d_items = arrays.d_items
    return Results(rows, *to_x(arrays.d_rows), items, *to_y(d_items), summed, *to_both(d_items))


def check(options, case, dtype, width):
    plan, arrays = draw(case, dtype, width)
    with no_races() if options[: len(GPU)] == GPU else contextlib.nullcontext():
        got = jax.block_until_ready(moved(options, plan, arrays))
    for name, result, wanted in zip(Results._fields, got, judge(plan, arrays), strict=True):
        assert result.dtype == wanted.dtype
        np.testing.assert_array_equal(result, wanted, err_msg=name)


def over(cases, **options):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name, **options)


@over(ALL_CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla(dtype, case):
    check(XLA, case, dtype, 5)


@pytest.mark.hopper
@over(ALL_CASES)
def test_kernels(case):
    check(GPU, case, "bfloat16", 512)


@pytest.mark.hopper
@over(FEW)
@pytest.mark.parametrize("width", [128, 384])
def test_kernels_in_float32(width, case):
    """Widths of one and of several pieces of 128 elements are served."""
    check(GPU, case, "float32", width)


@pytest.mark.hopper
@over(FEW)
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_blocks_of_rows(rows, case):
    """Blocks that do not divide the rows, and one larger than all rows, are served."""
    check((*GPU, ("config", moves_mosaic.MoveMosaicConfig(rows=rows))), case, "bfloat16", 128)


@pytest.mark.parametrize("options", [XLA, GPU])
def test_nothing_is_scattered(options):
    """Forward and backward programs have gathers only."""
    program = str(jax.make_jaxpr(moved, static_argnums=0)(options, *draw(FEW[0], "float32", 128)))
    assert "scatter" not in program
    assert ("gather" in program) == (options is XLA)


def test_gradient_of_a_compiled_move():
    """Residuals of the backward pass can cross a `jit` boundary."""
    plan, arrays = draw(FEW[0], "float32", 4)
    move = jax.jit(lambda y, shared: combine(plan, y, shared))
    for argument, wanted in ((0, "dy"), (1, "d_shared")):
        got = jax.grad(lambda *ys: (move(*ys) * arrays.d_items).sum(), argument)(
            jnp.nan_to_num(arrays.y), arrays.shared
        )
        np.testing.assert_array_equal(got, getattr(judge(plan, arrays), wanted))


def test_a_column_of_scores_goes_by_xla():
    """Rows of one element, such as router weights, are left to XLA."""
    interpret = dict(GPU)["interpret"]
    assert move_implementation(array(16, 1), interpret=interpret) == "xla"
    assert move_implementation(array(16, 128), interpret=interpret) == "mosaic_gpu"
    assert move_implementation(array(16, 128)) == "xla"


@pytest.mark.parametrize(
    ("width", "adds", "rows"),
    [(5120, False, 4), (5120, True, 2), (128, True, 8), (32768, True, 1)],
)
def test_rows_of_a_block(width, adds, rows):
    """A block takes at most a fifth of shared memory, so that five run on a multiprocessor."""
    assert moves_mosaic.config_for(moves.MoveCase(width, "bfloat16", adds)).rows == rows


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


CASE = named("uneven")  # 50 items
CALL = {"x": array(50, 128), "shared": array(50, 128)}
KERNEL = {"implementation": "mosaic_gpu", "interpret": plgpu.InterpretGPUParams()}
MISTAKES = {
    "unknown implementation": (
        {"implementation": "triton"},
        "implementation 'triton' is unknown; there are mosaic_gpu, xla",
    ),
    "implementation without its hardware": (
        {"implementation": "mosaic_gpu"},
        "'mosaic_gpu' does not serve this call: it needs an H100 or H200, and this is cpu",
    ),
    "type for the kernel": (
        KERNEL | {"dtype": jnp.float16},
        "it takes bfloat16 or float32, not float16",
    ),
    "width for the kernel": (
        KERNEL | {"width": 200},
        "it takes rows that are multiples of 128 elements, not 200",
    ),
    "a long row": (
        KERNEL | {"width": 32768, "dtype": jnp.float32},
        "it takes rows of at most 65536 bytes, not 131072",
    ),
    "interpreter of another": (KERNEL | {"interpret": True}, "plgpu.InterpretGPUParams"),
    "integers": ({"dtype": jnp.int8}, "is int8.*; it must be floating"),
    "config of another implementation": (
        {"implementation": "xla", "config": moves_mosaic.MoveMosaicConfig()},
        "not for implementation 'xla', which takes pallas_kernels.experts.moves.MoveXlaConfig",
    ),
    "no rows": (KERNEL | {"config": moves_mosaic.MoveMosaicConfig(rows=0)}, "config has rows=0"),
    "too many rows": (
        KERNEL | {"config": moves_mosaic.MoveMosaicConfig(rows=23), "width": 5120},
        "config has rows=23; a block of such rows has from 1 to 22",
    ),
}
APART = {
    "items": ({"x": (49, 128)}, r"x is bfloat16\(49, 128\); .*\[50, width\].* 50 items"),
    "an item alone": ({"x": (128,)}, r"x is bfloat16\(128,\)"),
    "rows": ({"y": (50, 128)}, r"y is bfloat16\(50, 128\); .* \d+ rows"),
    "shared rows": (
        {"shared": (49, 128)},
        r"shared is bfloat16\(49, 128\); it must be bfloat16\(50, 128\)",
    ),
    "shared width": ({"shared": (50, 64)}, r"shared is bfloat16\(50, 64\)"),
}


def parametrize(mistakes):
    return pytest.mark.parametrize(("change", "says"), mistakes.values(), ids=mistakes)


def traced(move, *arrays, **options):
    return jax.jit(functools.partial(move, planned(CASE), **options)).trace(*arrays).out_info


def rows_of_plan():
    return len(planned(CASE).item_of_row)


@parametrize(MISTAKES)
@pytest.mark.parametrize("move", [dispatch, combine])
def test_mistake(untyped, move, change, says):
    change = dict(change)
    width, dtype = change.pop("width", 128), change.pop("dtype", jnp.bfloat16)
    count = 50 if move is dispatch else rows_of_plan()
    with pytest.raises(ValueError, match=says):
        traced(move, array(count, width, dtype=dtype), **change)


@parametrize(APART)
def test_arguments_that_do_not_fit_together(untyped, change, says):
    shapes = {"x": (50, 128), "y": (rows_of_plan(), 128), "shared": (50, 128)} | change
    x, y, shared = (array(*shape) for shape in shapes.values())
    with pytest.raises(ValueError, match=says):
        traced(dispatch, x)
        traced(combine, y, shared)


def test_shared_rows_of_another_type(untyped):
    with pytest.raises(ValueError, match=r"shared is float32\(50, 128\); it must be bfloat16"):
        traced(combine, array(rows_of_plan(), 128), array(50, 128, dtype=jnp.float32))


def test_the_call_without_a_mistake():
    """The call that every case changes by one mistake is itself correct."""
    rows = array(rows_of_plan(), 128)
    for options in ({}, dict(GPU), dict(XLA) | {"config": moves.MoveXlaConfig()}):
        assert traced(dispatch, array(50, 128), **options).shape == rows.shape
        assert traced(combine, rows, array(50, 128), **options).shape == (50, 128)
