"""Pages taken and given back at random, against a simulation in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.model.kv_cache.pages import (
    FREE,
    empty_pool,
    give_back,
    pool_index,
    take_pages,
    write_coords,
)
from pallas_kernels.attention import Coords

PAGE, ROWS, COLUMNS, PAGES = 4, 5, 6, 19


@jax.jit
def grow(pool, slots, new):
    rows = jnp.broadcast_to(jnp.arange(ROWS)[:, None], slots.shape)
    pool = take_pages(pool, slots, rows)
    where = pool_index(pool, slots, rows)
    return write_coords(pool, where, new), where


leave = jax.jit(give_back)


def step(rng, lengths, room):
    """New slots [rows, 3] for rows that have room; -1 where there is no token."""
    slots = np.full((ROWS, 3), -1, np.int32)
    for row in rng.permutation(ROWS):
        count = int(rng.integers(0, 4))
        pages = -(-(lengths[row] + count) // PAGE) - -(-lengths[row] // PAGE)
        if pages <= room and lengths[row] + count <= COLUMNS * PAGE:
            slots[row, 3 - count :] = np.arange(lengths[row], lengths[row] + count)
            lengths[row] += count
            room -= pages
    return slots


@pytest.mark.parametrize("seed", range(3))
def test_rows_join_grow_and_leave(seed):
    """Each row's tokens are in order in its own pages, and nothing else can be seen."""
    rng, lengths = np.random.default_rng(seed), np.zeros(ROWS, int)
    pool, tokens = empty_pool(ROWS, COLUMNS, PAGES, PAGE, 1, 1), [[] for _ in range(ROWS)]
    for number in range(120):
        leaves = rng.random(ROWS) < 0.08
        pool = leave(pool, leaves)
        for row in np.flatnonzero(leaves):
            lengths[row], tokens[row] = 0, []
        slots = step(rng, lengths, int((np.asarray(pool.owner) == FREE).sum()))
        position = rng.integers(0, 10**6, slots.shape).astype(np.int32)
        segment = np.where(slots >= 0, number + 1, 0).astype(np.int32)
        pool, where = grow(pool, slots, Coords(position, segment))
        for row in range(ROWS):
            tokens[row] += zip(position[row], segment[row], strict=True)
            tokens[row] = [token for token in tokens[row] if token[1]]
        assert (np.asarray(where)[slots < 0] == PAGES * PAGE).all()
        check(pool, tokens)


def check(pool, tokens):
    table, owner = np.asarray(pool.table)[0], np.asarray(pool.owner)
    position, segment = (np.asarray(x) for x in pool.coords)
    assert not segment[owner < 0].any()
    for row, expected in enumerate(tokens):
        pages = table[row][: -(-len(expected) // PAGE)]
        assert (owner[pages] == row).all() and not table[row][len(pages) :].any()
        assert (owner == row).sum() == len(set(pages.tolist())) == len(pages)
        seen = segment[pages].ravel() != 0
        got = zip(position[pages].ravel()[seen], segment[pages].ravel()[seen], strict=True)
        assert list(got) == expected
