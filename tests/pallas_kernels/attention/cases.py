"""Cases of attention, their inputs, and their results in float64 NumPy: the judge of all."""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Coords

CHUNK = 16
FAR = 10_485_760 - 2 * CHUNK  # near the end of the longest context, at a chunk's edge
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
SCALE = 0.25  # not head_size ** -0.5; sharp enough for one wrong key to show


def place(*rows):
    """Coords of rows that are written as runs (segment, count) or (segment, count, start)."""

    def lay(of_run):
        return np.array([np.concatenate([of_run(*run) for run in row]) for row in rows], np.int32)

    return Coords(
        position=lay(lambda segment, count, start=0: start + np.arange(count)),
        segment=lay(lambda segment, count, start=0: np.full(count, segment)),
    )


def part(coords, start, stop=None):
    """The tokens in those slots."""
    return Coords(*(c[:, start:stop] for c in coords))


def turned(coords, by):
    """The same tokens in other slots, as in a ring."""
    return Coords(*(np.roll(c, by, axis=1) for c in coords))


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Queries and keys by their coordinates; those of equal shape and rule share a compilation."""

    name: str
    q: Coords
    k: Coords
    heads: tuple[int, int] = (1, 1)
    head_dim: int = 64
    causal: bool = True
    chunk: int | None = CHUNK
    in_order: bool = False
    plain: bool = False  # the coordinates are those that a call without any means
    blocks: tuple[int, int] = (8, 16)  # of queries and of keys, where they are free


def itself(name, coords, **options):
    return Case(name, coords, coords, in_order=_in_order(coords), **options)


def long(name, q, k=None, **options):
    """Several tiles of 128 queries and blocks of 64 keys: masked, full and skipped."""
    options = {"chunk": None, "blocks": (32, 64), **options}
    return itself(name, q, **options) if k is None else Case(name, q, k, **options)


def _in_order(coords):
    return all(
        (np.diff(np.flatnonzero(segments == segment)) == 1).all()
        and (np.diff(positions[segments == segment]) > 0).all()
        for positions, segments in zip(*coords, strict=True)
        for segment in set(segments) - {0}
    )


PLAIN = place([(1, 53)], [(1, 53, 7)], [(1, 53, 16)])  # three chunks and a bit
LEFT = place([(0, 25), (1, 28)], [(1, 53)], [(0, 52), (1, 1)])
RIGHT = place([(1, 28), (0, 25)], [(1, 53)], [(1, 1), (0, 52)])
PACKED = place([(1, 20), (2, 29), (3, 1), (0, 3)], [(7, 1), (2, 52)], [(1, 16), (2, 37, 5)])
BROKEN = place([(1, 16), (2, 17), (1, 20, 5)], [(1, 53)], [(2, 9, 7), (0, 3), (2, 41)])
EMPTY = place([(0, 53)], [(1, 53)], [(0, 19), (3, 5), (0, 29)])
DISTANT = place([(1, 53, FAR)], [(0, 4), (1, 49, FAR + 5)], [(1, 33), (1, 20, FAR)])
RAGGED = place(*([(1, length), (0, 17 - length)] for length in (17, 16, 15, 1, 0)))
TWO = place([(1, 20), (2, 33)])
LONG = place([(1, 300)])
LONG_PACKED = place([(1, 40), (2, 220), (3, 40)])

CASES = [
    itself("one token", place([(1, 1)])),
    itself("one more than a chunk", place([(1, CHUNK + 1)])),
    itself("three chunks and a bit", PLAIN),
    itself("five query heads a key head", TWO, heads=(10, 2)),
    itself("as many key heads", TWO, heads=(2, 2)),
    itself("rows of about a chunk, or nothing", RAGGED),
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
    itself("segments that come back", BROKEN),
    Case("keys in any order", PACKED, turned(PACKED, 13)),
    Case("later part of the keys", part(LEFT, -13), LEFT),
    Case("one query", part(LEFT, -1), LEFT, chunk=None),
    Case("keys in a ring", place([(1, 9, 42)]), turned(place([(0, 6), (1, 10, 32)]), 5)),
    Case("keys of the past chunk", place([(1, 9, 32)]), place([(1, 16, 16)])),
    Case("keys of the future", place([(1, 9)]), place([(1, 16, 9)])),
    Case("keys of another segment", place([(1, 9, 9)]), place([(2, 16)])),
    long("long", LONG),
    long("long, chunks", LONG, chunk=256),
    long("long, chunks between blocks", place([(1, 300, 224)]), chunk=256),
    long("long, both directions", LONG, causal=False),
    long("long, packed", LONG_PACKED, chunk=256),
    long("long, packed, full", LONG_PACKED),
    long("long, packed, both directions", LONG_PACKED, causal=False),
    long("long, left padding", place([(0, 70), (1, 230)])),
    long("long, right padding", place([(1, 230), (0, 70)])),
    long("long, keys in any order", LONG, turned(LONG, 192)),
    long("long, middle of the keys", place([(1, 130, 150)]), LONG, chunk=256),
    long("long, later part of the keys", part(LONG, -130), LONG, chunk=256),
    long("long, two heads of size 128", place([(1, 200)]), heads=(2, 1), head_dim=128),
]
# What sets these apart is gone before a kernel starts, or are blocks that kernels cannot have.
MORE_CASES = [
    itself("one less than a chunk", place([(1, CHUNK - 1)])),
    itself("one chunk", place([(1, CHUNK)])),
    itself("packed, both directions", PACKED, causal=False),
    itself("heads of a vision tower", PACKED, causal=False, chunk=None, heads=(2, 2), head_dim=88),
    itself("tiles", place(*2 * [[(1, 53)]]), causal=False, chunk=None, plain=True, head_dim=88),
    itself("no coordinates", place([(1, 53)]), plain=True),
    itself("full", PLAIN, chunk=None),
    itself("packed, both directions, full", PACKED, causal=False, chunk=None),
    Case(
        "no coordinates, later part of the keys",
        place([(1, 13, 40)]),
        place([(1, 53)]),
        plain=True,
    ),
    Case("keys in any order, full", turned(DISTANT, 29), DISTANT, chunk=None),
    Case("later part of the keys, full", part(LEFT, -13), LEFT, chunk=None),
    Case("middle of the keys", part(PLAIN, 20, 33), PLAIN),
    Case("middle of the keys, both directions", part(PLAIN, 20, 33), PLAIN, causal=False),
    itself("blocks divide", place([(1, 48)]), blocks=(16, 8)),
    itself("blocks do not divide", PLAIN, blocks=(7, 11)),
    itself("one block", PLAIN, blocks=(256, 512)),
    itself("blocks of one", place([(1, 19)]), blocks=(1, 1)),
]


def named(*names):
    chosen = [case for case in CASES if case.name in names]
    assert len(chosen) == len(names)
    return chosen


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


class Results(NamedTuple):
    out: np.ndarray
    lse: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def draw(case, dtype="float32"):
    """q, k, v and the cotangents of the output and the log-sum-exp."""
    rng, d = np.random.default_rng(0), case.head_dim
    (batch, S), T = case.q.position.shape, case.k.position.shape[1]
    H, K = case.heads
    shapes = [(batch, H, S, d), (batch, K, T, d), (batch, K, T, d), (batch, H, S, d), (batch, H, S)]
    *arrays, d_lse = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return [*(x.astype(jnp.dtype(dtype)) for x in arrays), d_lse]


def judge(case, *arrays):
    """The results in float64, with the whole score matrix as in a textbook."""
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


@functools.cache
def rule(case):
    """Which keys each query sees, one pair of tokens at a time."""
    q, k = (np.stack(coords, -1).tolist() for coords in (case.q, case.k))

    def sees(query, key):
        (position, segment), (at, of) = query, key
        same_chunk = case.chunk is None or at // case.chunk == position // case.chunk
        return segment == of != 0 and same_chunk and (at <= position or not case.causal)

    return np.array([[[sees(i, j) for j in k[b]] for i in q[b]] for b in range(len(q))])


def assert_close(got, want, tolerance):
    """Largest error within `tolerance` of the largest value; -inf in the same places; no NaN."""
    got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
    assert not np.isnan(got).any()
    np.testing.assert_array_equal(got == -np.inf, want == -np.inf)
    got, want = (np.where(want == -np.inf, 0, x) for x in (got, want))
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def assert_same_zeros(got, want):
    """Exact zeros where nothing is seen, which is where the judge has them."""
    assert not np.asarray(got)[want == 0].any()
