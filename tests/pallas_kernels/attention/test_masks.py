"""Who sees whom: `visible` is the rule, and no block of a visible pair is left out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Coords, coords_of, make_mask, visible
from pallas_kernels.attention.masks import block_ranges, extents, pad_tokens, visible_blocks
from tests.pallas_kernels.attention.cases import (
    CASES,
    MORE_CASES,
    Case,
    each,
    itself,
    named,
    place,
    rule,
)

MOSAIC_BLOCKS = 128, 64


def drawn(seed):
    """Anything goes: tokens in any order, several of one position, padding anywhere."""
    rng = np.random.default_rng(seed)

    def coords(length):
        step, turn, padding = rng.choice([0, 1, 2]), rng.integers(4, 40), rng.choice([0, 0.1])
        shape, index = (3, length), np.arange(length)
        position = rng.integers(0, 40) + step * index + rng.integers(0, 3, shape)
        segment = np.where(rng.random(shape) < padding, 0, 1 + index // turn % 2)
        return Coords(position.astype(np.int32), segment.astype(np.int32))

    chunk = [None, 7, 50][seed % 3]
    return Case(f"drawn {seed}", coords(48), coords(60), causal=bool(seed % 2), chunk=chunk)


LONG = [case for case in CASES if case.k.position.shape[1] > 64]
EVERY = CASES + MORE_CASES + [drawn(seed) for seed in range(30)]


@functools.partial(jax.jit, static_argnums=(2, 3))
def compute_visible(q, k, causal, chunk):
    return visible(make_mask(causal, chunk).key_range(q), k)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def compute_visible_blocks(q, k, causal, chunk, blocks):
    q = pad_tokens(make_mask(causal, chunk).key_range(q), blocks[0])
    return visible_blocks(q, extents(pad_tokens(k, blocks[1]), blocks[1]), blocks[0])


def compute(function, case, *more):
    return jax.tree.map(np.asarray, function(case.q, case.k, case.causal, case.chunk, *more))


def judge_visible_blocks(case, blocks):
    """(any pair of tokens is visible, all of real queries are) for each pair of blocks."""

    def pairs(x, fill):
        """[rows, query blocks, key blocks, pairs of tokens]; no query sees a key past the last."""
        extra = [-size % block for size, block in zip(x.shape[1:], blocks, strict=True)]
        x = np.pad(x, ((0, 0), (0, 0), (0, extra[1])))
        x = np.pad(x, ((0, 0), (0, extra[0]), (0, 0)), constant_values=fill)
        rows, S, T = x.shape
        x = x.reshape(rows, S // blocks[0], blocks[0], T // blocks[1], blocks[1])
        return x.swapaxes(2, 3).reshape(*x.shape[:2], T // blocks[1], -1)

    some = pairs(rule(case), False).any(-1)
    return some, some & pairs(rule(case) | (case.q.segment == 0)[:, :, None], True).all(-1)


@each(EVERY)
def test_visible_is_the_rule(case):
    np.testing.assert_array_equal(compute(compute_visible, case), rule(case))


@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        *(pytest.param(case, case.blocks, id=case.name) for case in EVERY),
        *(pytest.param(case, MOSAIC_BLOCKS, id=f"{case.name}, Mosaic's blocks") for case in LONG),
    ],
)
def test_no_visible_pair_is_left_out(case, blocks):
    """Nor is a pair that is not visible among those that need no mask."""
    some, every = compute(compute_visible_blocks, case, blocks)
    want_some, want_every = judge_visible_blocks(case, blocks)
    assert not (want_some & ~some).any()
    assert not (every & ~want_every).any()


@each(named("long", "long, chunks", "long, chunks between blocks", "long, both directions"))
def test_one_sequence_in_order_meets_no_block_too_many(case):
    """Catches bounds that are right but loose: blocks computed for nothing, masks for nothing."""
    for got, want in zip(
        compute(compute_visible_blocks, case, MOSAIC_BLOCKS),
        judge_visible_blocks(case, MOSAIC_BLOCKS),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


def test_padding_queries_do_not_keep_a_block_from_being_full():
    coords = place([(1, 100), (0, 28)])
    case = itself("", coords, causal=False, chunk=None)
    some, every = compute(compute_visible_blocks, case, MOSAIC_BLOCKS)
    assert some.tolist() == [[[True, True]]]
    assert every.tolist() == [[[True, False]]]


def compute_ranges(kinds):
    """Masks of blocks that are "." (unseen), "m" (masked) or "f" (full)."""
    return [
        np.asarray(x) for x in block_ranges(jnp.asarray(kinds != "."), jnp.asarray(kinds == "f"))
    ]


@pytest.mark.parametrize(
    ("kinds", "want"),
    [
        ("mmffm", (0, 2, 4, 5)),
        (".mfm..", (1, 2, 3, 4)),
        ("..fff", (2, 2, 5, 5)),
        ("m..m.", (0, 0, 0, 4)),
        ("m.f.m", (0, 2, 3, 5)),
        ("ffmfm", (0, 0, 0, 5)),
        ("f.f", (0, 0, 0, 3)),
        ("...", (0, 0, 0, 0)),
    ],
)
def test_ranges(kinds, want):
    """Full blocks in two runs are masked: catches a run that spans what is between."""
    assert np.ravel(compute_ranges(np.array([[list(kinds)]]))).tolist() == list(want)


@pytest.mark.parametrize("side", ["queries", "keys"])
def test_ranges_hold_what_is_met(side):
    rng = np.random.default_rng(0)
    kinds = rng.choice(list("..mff"), (200, 4, 5))
    if side == "keys":
        kinds = kinds.swapaxes(1, 2)
    start, full_start, full_stop, stop = (x[..., None] for x in compute_ranges(kinds))
    index = np.arange(kinds.shape[-1])
    assert (start <= full_start).all() and (full_start <= full_stop).all()
    assert (full_stop <= stop).all()
    assert not ((kinds != ".") & ((index < start) | (index >= stop))).any()
    assert not ((kinds != "f") & (full_start <= index) & (index < full_stop)).any()


def test_coords_of():
    plain = coords_of(2, 3)
    assert plain.position.tolist() == [[0, 1, 2]] * 2
    assert plain.segment.tolist() == [[1, 1, 1]] * 2
    ragged = coords_of(2, 3, start=jnp.array([5, 0]), lengths=jnp.array([2, 0]))
    assert ragged.position.tolist() == [[5, 6, 7], [0, 1, 2]]
    assert ragged.segment.tolist() == [[1, 1, 0], [0, 0, 0]]
