"""`flash_attention`: every implementation against float64 NumPy on one table of cases."""

import re

import jax
import numpy as np
import pytest

from pallas_kernels.attention import flash_attention
from pallas_kernels.compile.absent import absent_h100s, lower_for
from tests.pallas_kernels.attention.cases import (
    CASES,
    MORE_CASES,
    SCALE,
    TOLERANCE,
    Case,
    Results,
    assert_close,
    assert_same_zeros,
    draw,
    each,
    itself,
    judge,
    named,
    place,
)
from tests.pallas_kernels.attention.ways import (
    CUDNN,
    MOSAIC_GPU,
    SPLASH,
    XLA,
    XLA_OF_FIXED_LENGTH,
    differentiated,
    differentiated_alone,
    forward,
    over,
    results,
    runs,
)

FEW = named("packed", "rows that see nothing", "long, packed")
ONE = named("long, packed")
DIFFERENTIATED = over(
    runs(XLA, "float32", CASES + MORE_CASES),
    runs(XLA, "bfloat16", FEW),
    runs(XLA_OF_FIXED_LENGTH, "float32", CASES + MORE_CASES),
    runs(MOSAIC_GPU, "bfloat16"),
    runs(SPLASH, "float32", FEW),
)
ONE_OF_EACH = over(
    runs(XLA, "float32", ONE), runs(MOSAIC_GPU, "bfloat16", ONE), runs(SPLASH, "float32", ONE)
)


@DIFFERENTIATED
def test_output_and_gradients(way, dtype, case):
    got, want = results(way, dtype, case), judge(case, *draw(case, dtype))
    check_output(got, dtype, case)
    for name, x, y in list(zip(Results._fields, got, want, strict=True))[2:]:
        assert x.dtype == dtype, name
        assert_close(x, y, TOLERANCE[dtype])
        assert_same_zeros(x, y)


@over(
    runs(XLA, "float32", ONE),
    runs(MOSAIC_GPU, "bfloat16", ONE),
    runs(SPLASH, "float32", CASES + MORE_CASES),
    runs(SPLASH, "bfloat16", FEW),
)
def test_output_of_a_call_that_is_not_differentiated(way, dtype, case):
    check_output(way.call(forward, case, *draw(case, dtype)[:3]), dtype, case)


def check_output(got, dtype, case):
    """Also of bfloat16 the log-sum-exp is exact, and shows each key too many or too few."""
    out, lse, *_ = got
    want = judge(case, *draw(case, dtype))
    assert (out.dtype, lse.dtype) == ("float32", "float32")
    assert_close(out, want.out, TOLERANCE[dtype])
    assert_close(lse, want.lse, TOLERANCE["float32"])
    assert_same_zeros(out, want.out)


@over(
    runs(XLA, "float32", ONE),
    runs(MOSAIC_GPU, "bfloat16", ONE),
    runs(CUDNN, "bfloat16", CASES[1:] + MORE_CASES),
    runs(SPLASH, "float32", CASES[1:]),  # one token alone has the gradient 0, but for rounding
    runs(SPLASH, "bfloat16", FEW),
)
def test_call_without_the_log_sum_exp(way, dtype, case):
    """Splash runs its own kernel backward only then."""
    *arrays, d_lse = draw(case, dtype)
    want = judge(case, *arrays, np.zeros(d_lse.shape))
    got = way.call(differentiated_alone, case, *arrays)
    for x, y in zip(got, (want.out, *want[2:]), strict=True):
        assert_close(x, y, TOLERANCE[dtype])


@over(
    runs(MOSAIC_GPU, "float32", FEW, served=False),
    runs(CUDNN, "bfloat16", served=False),
    runs(CUDNN, "float32", ONE, served=False),
    runs(SPLASH, "float32", served=False),
)
def test_says_why_it_does_not_serve(way, dtype, case):
    with pytest.raises(ValueError, match=re.escape(way.why_not(case, dtype))):
        way.call(forward, case, *draw(case, dtype)[:3])


@ONE_OF_EACH
def test_own_config(way, dtype, case):
    """The sizes that a call without a config gets."""
    arrays = draw(case, dtype)
    got = way.call(differentiated, case, *arrays, config=None)
    for x, y in zip(got, judge(case, *arrays), strict=True):
        assert_close(x, y, TOLERANCE[dtype])


@ONE_OF_EACH
def test_large_scores_do_not_overflow(way, dtype, case):
    """Catches a softmax without its running maximum: exp(100) is no float32."""
    q, k, v, *cotangents = draw(case, dtype)
    arrays = 4 * q, 4 * k, v, *cotangents
    got, want = way.call(differentiated, case, *arrays), judge(case, *arrays)
    assert want.lse.max() > 100
    assert_close(got.out, want.out, TOLERANCE[dtype])
    assert_close(got.lse, want.lse, TOLERANCE["float32"])
    assert_close(got.dv, want.dv, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("q", "k", "unseen"),
    [
        (place([(1, 16, 256)]), place([(1, 384)]), slice(None, 256)),
        (place([(1, 10), (0, 6)]), place([(1, 16), (0, 368)]), slice(128, None)),
    ],
    ids=["earlier chunks", "unused slots"],
)
@pytest.mark.parametrize(
    ("way", "dtype"),
    [(XLA, "float32"), (XLA_OF_FIXED_LENGTH, "float32"), (MOSAIC_GPU, "bfloat16")],
    ids=["xla", "xla-fixed", "mosaic_gpu"],
)
def test_blocks_that_nobody_sees_are_skipped(way, dtype, q, k, unseen):
    """NaN in a block shows up as soon as the block is computed, forward or backward."""
    case = Case("", q, k, chunk=128, blocks=(16, 64))
    q, k, v, *cotangents = draw(case, dtype)
    k[:, :, unseen] = v[:, :, unseen] = np.nan
    got = way.call(differentiated, case, q, k, v, *cotangents)
    assert not any(np.isnan(x).any() for x in got)
    assert not got.dk[:, :, unseen].any() and not got.dv[:, :, unseen].any()


@pytest.mark.parametrize("way", [XLA, XLA_OF_FIXED_LENGTH, CUDNN], ids=str)
def test_padding_that_is_no_number(way):
    """Catches its values times a probability of 0; tokens lie in the same blocks."""
    case = itself("", place([(1, 20), (0, 12)]), chunk=32)
    q, k, v, d_out, _ = draw(case, "bfloat16")
    want = way.call(differentiated_alone, case, q, k, v, d_out)
    padding = (slice(None), slice(None), slice(20, None))
    for x in (q, k, v):
        x[padding] = np.nan
    got = way.call(differentiated_alone, case, q, k, v, d_out)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.absent_gpu
@each(
    named(
        "one token", "one more than a chunk",
        "long, later part of the keys", "long, two heads of size 128",
    )
)  # fmt: skip
def test_every_shape_lowers_for_hopper(case):
    """Catches shapes that the interpreter takes and the compiler does not."""

    def loss(q, k, v, q_coords, k_coords):
        options = {"causal": case.causal, "chunk": case.chunk, "implementation": "mosaic_gpu"}
        return flash_attention(q, k, v, q_coords, k_coords, scale=SCALE, **options).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    lowered = lower_for(absent_h100s(1)[0], gradient, *draw(case, "bfloat16")[:3], case.q, case.k)
    assert "mosaic_gpu" in lowered.as_text()


def test_the_judge_differentiates_itself():
    """Its gradients against its own outputs, by central differences."""
    (case,) = named("packed")
    *qkv, d_out, d_lse = (np.asarray(x).astype(np.float64) for x in draw(case))
    rng = np.random.default_rng(1)
    directions = [rng.standard_normal(x.shape) for x in qkv]

    def loss(step):
        moved = [x + step * direction for x, direction in zip(qkv, directions, strict=True)]
        result = judge(case, *moved, d_out, d_lse)
        seen = np.isfinite(result.lse)
        return (result.out * d_out).sum() + (result.lse * d_lse)[seen].sum()

    gradients = judge(case, *qkv, d_out, d_lse)[2:]
    slope = sum(np.vdot(g, direction) for g, direction in zip(gradients, directions, strict=True))
    np.testing.assert_allclose((loss(1e-5) - loss(-1e-5)) / 2e-5, slope, rtol=1e-7)
