"""Grouped products of every implementation agree with float64 NumPy on one table of cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.experts import grouped_matmul
from tests.pallas_kernels.attention.cases import TOLERANCE, assert_close
from tests.pallas_kernels.experts.cases import (
    ALL_CASES,
    CASES,
    FORWARD_CASES,
    KERNEL_CASES,
    Arrays,
    draw,
    judge,
    judge_gated,
    named,
    on_tpus,
    planned,
)
from tests.pallas_kernels.experts.ways import (
    MEGABLOX,
    MOSAIC_GPU,
    MOSAIC_TPU,
    XLA,
    XLA_LOOP,
    gated,
    gated_results,
    over,
    results,
    rows_multiplied,
    runs,
)

STREAMED = named("blocks of 8, whole blocks, some without a group")
TILED = named("blocks of 128, first group empty, some without a group")
FEW = [named("uneven"), named("some without a group"), STREAMED]
TPU_FEW = on_tpus([STREAMED, TILED])
DIFFERENTIATED = over(
    runs(XLA, "float32", ALL_CASES),
    runs(XLA, "bfloat16", FEW),
    runs(XLA_LOOP, "float32", FEW),
    runs(MOSAIC_GPU, "bfloat16", KERNEL_CASES),
    runs(MOSAIC_TPU, "float32", TPU_FEW[:1]),
    runs(MOSAIC_TPU, "bfloat16", on_tpus(KERNEL_CASES)),
    runs(MEGABLOX, "float32", [named("uneven"), *KERNEL_CASES]),
    runs(MEGABLOX, "bfloat16", [TILED]),
)
GATED_DIFFERENTIATED = over(
    runs(XLA, "float32", [*CASES, STREAMED, TILED]),
    runs(XLA, "bfloat16", FEW),
    runs(XLA_LOOP, "float32", FEW),
    runs(MOSAIC_GPU, "bfloat16", [STREAMED, TILED]),
    runs(MOSAIC_TPU, "bfloat16", TPU_FEW),
    runs(MEGABLOX, "float32", [STREAMED, TILED]),
)


def check(got, want, dtype):
    for name, x, y in zip(want._fields, got, want, strict=True):
        assert x.dtype == ("float32" if name == "d_scale" else dtype), name
        assert_close(x, y, TOLERANCE[dtype])


@DIFFERENTIATED
def test_products_and_gradients(way, dtype, case):
    check(results(way, dtype, case), judge(case, draw(case, dtype)), dtype)


@GATED_DIFFERENTIATED
def test_gated_products_and_gradients(way, dtype, case):
    check(gated_results(way, dtype, case), judge_gated(case, draw(case, dtype)), dtype)


@over(
    runs(XLA, "float32", FEW),
    runs(XLA_LOOP, "float32", FEW),
    runs(MOSAIC_GPU, "bfloat16", KERNEL_CASES + FORWARD_CASES),
    runs(MOSAIC_TPU, "bfloat16", on_tpus(KERNEL_CASES + FORWARD_CASES)),
    runs(MOSAIC_TPU, "float32", TPU_FEW[:1]),
)
def test_gated_products_that_are_not_differentiated(way, dtype, case):
    """Without gradients, both products are computed by one kernel."""
    arrays = draw(case, dtype)
    got = way.call(gated, planned(case), *arrays[:4])
    assert got.dtype == dtype
    assert_close(got, judge_gated(case, arrays).out, TOLERANCE[dtype])


@over(
    runs(XLA, "float32", FEW),
    runs(XLA_LOOP, "float32", FEW),
    runs(MOSAIC_GPU, "bfloat16", [STREAMED, TILED]),
    runs(MOSAIC_TPU, "bfloat16", TPU_FEW[:1]),
)
def test_gated_products_without_a_scale(way, dtype, case):
    arrays = draw(case, dtype)._replace(scale=None)
    got = way.call(gated, planned(case), *arrays[:4])
    ones = arrays._replace(scale=np.ones(len(case.group)))
    assert_close(got, judge_gated(case, ones).out, TOLERANCE[dtype])


@over(
    runs(XLA, "bfloat16", [STREAMED, TILED]),
    runs(MOSAIC_TPU, "bfloat16", TPU_FEW),
    runs(MEGABLOX, "bfloat16", [STREAMED, TILED]),
)
def test_blocks_without_a_group_are_skipped(way, dtype, case):
    """Results of empty blocks stay zero, or NaN in an interpreter; computed they would be D.

    The GPU interpreter cannot show this: reading beyond the last matrix gives NaN there too.
    """
    plan, w = planned(case), np.ones((case.E, case.D, case.F), dtype)
    rows = np.ones((len(plan.item_of_row), case.D), dtype)
    got = np.asarray(way.call(rows_multiplied, plan, rows, w)).astype(np.float32)
    empty = np.repeat(plan.group_of_block == case.E, case.block)
    assert empty.any() and (got[~empty] == case.D).all()
    assert not np.nan_to_num(got[empty]).any()


def test_sums_are_float32():
    """Sums of more than 256 ones are exact, which a bfloat16 sum would not be."""
    x, w = jnp.ones((8, 1000), jnp.bfloat16), jnp.ones((1, 1000, 2), jnp.bfloat16)
    y, transpose = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.zeros(2, jnp.int32)), x, w)
    dx, dw = transpose(y)
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(np.float32), 1000)
    np.testing.assert_array_equal(dx.astype(np.float32), 2000)
    np.testing.assert_array_equal(dw.astype(np.float32), 8000)


@pytest.mark.parametrize("judged", [judge, judge_gated])
def test_the_judge_differentiates_itself(judged):
    """The reference's gradients agree with central differences of its own products."""
    case = named("some without a group")
    *inputs, d_out = (np.nan_to_num(z).astype(np.float64) for z in draw(case))
    rng = np.random.default_rng(1)
    directions = [rng.standard_normal(z.shape) for z in inputs]

    def loss(step):
        moved = [z + step * direction for z, direction in zip(inputs, directions, strict=True)]
        return (judged(case, Arrays(*moved, d_out)).out * d_out).sum()

    _, *gradients = judged(case, Arrays(*inputs, d_out))
    along = directions if judged is judge_gated else [directions[0], directions[3]]
    slope = sum(np.vdot(g, direction) for g, direction in zip(gradients, along, strict=True))
    np.testing.assert_allclose((loss(1e-5) - loss(-1e-5)) / 2e-5, slope, rtol=1e-7)
