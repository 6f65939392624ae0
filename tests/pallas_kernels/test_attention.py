"""Attention: every implementation against float64 NumPy on one table of cases."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Coords, flash_attention, merge, visible

IMPLEMENTATIONS = [pytest.param(flash_attention, id="xla")]
CHUNK = 16
FAR = 10_485_760 - 2 * CHUNK  # near the end of the longest context, at a chunk's edge
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
SCALE = 0.4


def place(*rows):
    """Coords of rows that are written as runs (segment, count) or (segment, count, start)."""

    def lay(of_run):
        return np.array([np.concatenate([of_run(*run) for run in row]) for row in rows], np.int32)

    return Coords(
        position=lay(lambda segment, count, start=0: start + np.arange(count)),
        segment=lay(lambda segment, count, start=0: np.full(count, segment)),
    )


def last(coords, count):
    return Coords(*(c[:, -count:] for c in coords))


def turned(coords, by):
    """The same tokens in other slots, as in a ring."""
    return Coords(*(np.roll(c, by, axis=1) for c in coords))


@dataclasses.dataclass(frozen=True)
class Case:
    """Queries and keys by their coordinates; cases of equal shape share one compilation."""

    name: str
    q: Coords
    k: Coords
    heads: tuple[int, int] = (4, 2)
    chunk: int | None = CHUNK
    blocks: tuple[int, int] = (8, 16)


def itself(name, coords, **options):
    return Case(name, coords, coords, **options)


PLAIN = place([(1, 53)], [(1, 53)], [(1, 53)])  # three chunks and a bit
LEFT = place([(0, 25), (1, 28)], [(1, 53)], [(0, 52), (1, 1)])
RIGHT = place([(1, 28), (0, 25)], [(1, 53)], [(1, 1), (0, 52)])
PACKED = place(
    [(1, 20), (2, 29), (3, 1), (0, 3)], [(7, 1), (2, 52)], [(1, 16), (2, 17), (1, 20, 5)]
)
EMPTY = place([(0, 53)], [(1, 53)], [(0, 19), (3, 5), (0, 29)])
DISTANT = place([(1, 53, FAR)], [(0, 4), (1, 49, FAR + 5)], [(1, 33), (1, 20, FAR)])

CASES = [
    itself("one token", place([(1, 1)])),
    itself("one less than a chunk", place([(1, CHUNK - 1)])),
    itself("one chunk", place([(1, CHUNK)])),
    itself("one more than a chunk", place([(1, CHUNK + 1)])),
    itself("three chunks and a bit", PLAIN),
    itself("full", PLAIN, chunk=None),
    itself("blocks divide", place([(1, 48)]), blocks=(16, 8)),
    itself("blocks do not divide", PLAIN, blocks=(7, 11)),
    itself("one block", PLAIN, blocks=(256, 512)),
    itself("blocks of one", place([(1, 19)]), blocks=(1, 1)),
    itself("five query heads a key head", PACKED, heads=(10, 2)),
    itself("as many key heads", PACKED, heads=(3, 3), chunk=None),
    itself("left padding", LEFT),
    itself("left padding, full", LEFT, chunk=None),
    itself("right padding", RIGHT),
    itself("right padding, full", RIGHT, chunk=None),
    itself("packed", PACKED),
    itself("packed, full", PACKED, chunk=None),
    itself("rows that see nothing", EMPTY),
    itself("rows that see nothing, full", EMPTY, chunk=None),
    itself("far positions", DISTANT),
    itself("far positions, full", DISTANT, chunk=None),
    Case("keys in any order", PACKED, turned(PACKED, 13)),
    Case("keys in any order, full", turned(DISTANT, 29), DISTANT, chunk=None),
    Case("later part of the keys", last(PLAIN, 13), PLAIN),
    Case("later part of the keys, full", last(LEFT, 13), LEFT, chunk=None),
    Case("one query", last(LEFT, 1), LEFT, heads=(10, 2), chunk=None),
    Case("keys in a ring", place([(1, 9, 42)]), turned(place([(0, 6), (1, 10, 32)]), 5)),
    Case("keys of the past chunk", place([(1, 9, 32)]), place([(1, 16, 16)])),
    Case("keys of the future", place([(1, 9)]), place([(1, 16, 9)])),
    Case("keys of another segment", place([(1, 9, 9)]), place([(2, 16)])),
]


def named(*names):
    return [pytest.param(case, id=case.name) for case in CASES if case.name in names]


EVERY_CASE = named(*(case.name for case in CASES))


class Results(NamedTuple):
    out: np.ndarray
    lse: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def draw(case, dtype="float32"):
    """q, k, v and the cotangents of the output and the log-sum-exp."""
    rng, d = np.random.default_rng(0), 8
    (batch, S), T = case.q.position.shape, case.k.position.shape[1]
    H, K = case.heads
    shapes = [(batch, H, S, d), (batch, K, T, d), (batch, K, T, d), (batch, H, S, d), (batch, H, S)]
    *arrays, d_lse = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return [*(x.astype(jnp.dtype(dtype)) for x in arrays), d_lse]


def judge(case, *arrays):
    """The same in float64, with the whole score matrix as in a textbook."""
    q, k, v, d_out, d_lse = (np.asarray(x).astype(np.float64) for x in arrays)
    group = case.heads[0] // case.heads[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    with np.errstate(divide="ignore"):
        weight = np.exp(SCALE * (q @ k.swapaxes(2, 3))) * rule(case)[:, None]
        lse = np.log(weight.sum(-1))
    p = weight / np.where(np.isfinite(lse), weight.sum(-1), 1)[..., None]
    dp = d_out @ v.swapaxes(2, 3)
    ds = SCALE * p * (dp - (p * dp).sum(-1, keepdims=True) + d_lse[..., None])
    dk, dv = ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ d_out
    dk, dv = (x.reshape(len(x), -1, group, *x.shape[2:]).sum(2) for x in (dk, dv))
    return Results(p @ v, lse, ds @ k, dk, dv)


def rule(case):
    """Which keys each query sees, one pair of tokens at a time."""
    q, k = (np.stack(coords, -1).tolist() for coords in (case.q, case.k))

    def sees(query, key):
        (position, segment), (at, of) = query, key
        first = position // case.chunk * case.chunk if case.chunk else 0
        return segment == of != 0 and first <= at <= position

    return np.array([[[sees(i, j) for j in k[b]] for i in q[b]] for b in range(len(q))])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def results(attention, chunk, blocks, q_coords, k_coords, q, k, v, d_out, d_lse):
    def run(q, k, v):
        sizes = {"block_q": blocks[0], "block_k": blocks[1]}
        return attention(q, k, v, q_coords, k_coords, scale=SCALE, chunk=chunk, **sizes)

    (out, lse), transpose = jax.vjp(run, q, k, v)
    return Results(out, lse, *transpose((d_out, d_lse)))


def compute(attention, case, *arrays):
    return results(attention, case.chunk, case.blocks, case.q, case.k, *arrays)


def assert_close(got, want, tolerance):
    """Largest error within `tolerance` of the largest value; -inf in the same places; no NaN."""
    got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
    assert not np.isnan(got).any()
    np.testing.assert_array_equal(got == -np.inf, want == -np.inf)
    got, want = (np.where(want == -np.inf, 0, x) for x in (got, want))
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def check(attention, case, dtype):
    arrays = draw(case, dtype)
    got, want = compute(attention, case, *arrays), judge(case, *arrays)
    for name, x, y in zip(Results._fields, got, want, strict=True):
        assert x.dtype == ("float32" if name == "lse" else dtype), name
        assert_close(x, y, TOLERANCE[dtype])


@pytest.mark.parametrize("case", EVERY_CASE)
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_output_and_gradients(attention, case):
    check(attention, case, "float32")


@pytest.mark.parametrize("case", named("three chunks and a bit", "packed", "rows that see nothing"))
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_bfloat16(attention, case):
    check(attention, case, "bfloat16")


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(attention):
    """Catches a softmax without its running maximum: exp(200) is no float32."""
    (case,) = [case for case in CASES if case.name == "three chunks and a bit"]
    q, k, v, *cotangents = draw(case)
    arrays = 10 * q, 10 * k, v, *cotangents
    got, want = compute(attention, case, *arrays), judge(case, *arrays)
    assert want.lse.max() > 200
    assert_close(got.out, want.out, 1e-5)
    assert_close(got.lse, want.lse, 1e-5)
    assert_close(got.dv, want.dv, 1e-5)


@pytest.mark.parametrize(
    ("q", "k", "unseen"),
    [
        (place([(1, 16, 48)]), place([(1, 64)]), slice(None, 48)),
        (place([(1, 10), (0, 6)]), place([(1, 16), (0, 48)]), slice(16, None)),
    ],
    ids=["earlier chunks", "unused slots"],
)
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_blocks_that_nobody_sees_are_skipped(attention, q, k, unseen):
    """NaN in a block shows up as soon as the block is computed, forward or backward."""
    case = Case("", q, k, heads=(1, 1), blocks=(16, 16))
    q, k, v, *cotangents = draw(case)
    k[:, :, unseen] = v[:, :, unseen] = np.nan
    got = compute(attention, case, q, k, v, *cotangents)
    assert not any(np.isnan(x).any() for x in got)
    assert not got.dk[:, :, unseen].any() and not got.dv[:, :, unseen].any()


@pytest.mark.parametrize("case", EVERY_CASE)
def test_visible_is_the_rule(case):
    run = jax.jit(visible, static_argnums=2)
    np.testing.assert_array_equal(run(case.q, case.k, case.chunk), rule(case))


@functools.partial(jax.jit, static_argnums=(0, 1))
def merged(cut, chunk, q_coords, k_coords, q, k, v, d_out):
    """Attention merged from the keys before `cut` and those from it on; and its gradients."""

    def run(q, k, v):
        parts = []
        for part in (slice(None, cut), slice(cut, None)):
            coords = q_coords, Coords(*(c[:, part] for c in k_coords))
            keys = k[:, :, part], v[:, :, part]
            parts.append(flash_attention(q, *keys, *coords, scale=SCALE, chunk=chunk))
        return merge(parts)

    out, transpose = jax.vjp(run, q, k, v)
    return out, *transpose(d_out)


@pytest.mark.parametrize(
    "case", named("three chunks and a bit", "packed", "rows that see nothing", "left padding")
)
def test_merged_parts_are_the_whole(case):
    """Also where one part, or both, saw nothing; a NaN there would spread by the gradient."""
    *arrays, d_lse = draw(case)
    got = merged(21, case.chunk, case.q, case.k, *arrays)
    want = judge(case, *arrays, np.zeros(d_lse.shape))
    for x, y in zip(got, (want.out, want.dq, want.dk, want.dv), strict=True):
        assert_close(x, y, 1e-5)


def test_merge_sums_in_float32():
    """Catches bfloat16 sums: 64 equal parts of one value must give that value."""
    out = jnp.full((1, 1, 1, 1), 1.0078125, jnp.bfloat16)
    whole = merge([(out, jnp.zeros((1, 1, 1)))] * 64)
    assert whole.dtype == jnp.bfloat16
    assert whole == out


def test_the_judge_differentiates_itself():
    """Its gradients against its own outputs, by central differences."""
    (case,) = [case for case in CASES if case.name == "packed"]
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
