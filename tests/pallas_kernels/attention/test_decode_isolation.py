"""Decoding where NaN or inf lies in one row, in padding or in pages of nobody: only it shows them.

What is multiplied with a probability of 0 is gone only if it was finite.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized import LARGEST
from tests.isolation import assert_isolated, is_spoiled, put
from tests.pallas_kernels.attention.cases import draw, place
from tests.pallas_kernels.attention.decode_cases import (
    Cache,
    decoding,
    filled,
    in_pages,
    whole,
)
from tests.pallas_kernels.attention.test_decode import MOSAIC_GPU, XLA, XLA_BFLOAT16

# Two rows have a query that is padding, of blocks with and without a mask; ends of pages are free.
CASE = decoding(
    "",
    place([(0, 1), (1, 1)], [(1, 2, 148)], [(0, 1), (1, 1, 191)]),
    filled(192, 1, 150, 192),
    head_dim=128,
)
ROW = 1
LAYOUTS = {"rows": whole, "pages": functools.partial(in_pages, page=64)}
RUNS = [(way, way.dtype, layout) for way in (XLA, MOSAIC_GPU) for layout in LAYOUTS]
RUNS += [(way, format, "pages") for way in (XLA_BFLOAT16, MOSAIC_GPU) for format in LARGEST]
PADDING = CASE.q.segment == 0
NONE = np.zeros_like(PADDING)
OWN = put(NONE, ROW, True)


def over(runs):
    return pytest.mark.parametrize(
        ("way", "format", "layout"), runs, ids=["-".join(map(str, run)) for run in runs]
    )


@functools.cache
def clean(way, format, layout):
    """The queries, the cache, and what comes of them."""
    q, cache = draw(CASE, way.dtype)[0], LAYOUTS[layout](CASE, format)
    return q, cache, way.call(CASE, q, cache)


def spoil(cache: Cache, name, tokens, value):
    """Keys or values of some tokens [rows or pages, tokens]; of integers, their scales."""

    def put_in(leaf):
        hit = tokens[:, None].reshape(len(tokens), 1, -1, *[1] * (leaf.ndim - 3))
        return leaf if leaf.dtype == jnp.int8 else jnp.where(hit, value, leaf).astype(leaf.dtype)

    return cache._replace(**{name: jax.tree.map(put_in, getattr(cache, name))})


def padding(cache: Cache):
    return (cache.coords or CASE.k).segment == 0


def pages(cache: Cache, *indices):
    """All tokens of these pages, or rows."""
    return put(np.zeros(cache.k.shape[::2][:2], bool), list(indices), True)


def check(way, format, layout, hit, q=None, cache=None):
    """All queries but `hit` [B, S] give what they gave; the output of those that are hit."""
    clean_q, clean_cache, want = clean(way, format, layout)
    got = way.call(CASE, clean_q if q is None else q, cache or clean_cache)
    by_query = [[np.moveaxis(np.asarray(x), 1, 2) for x in results] for results in (got, want)]
    for x, y in zip(*by_query, strict=True):
        assert_isolated(x, y, hit)
    return by_query[0][0][hit]


@pytest.mark.slow
@pytest.mark.parametrize("name, value", [("k", np.nan), ("v", np.inf)], ids=["k", "v"])
@over(RUNS)
def test_a_row(way, format, layout, name, value):
    """In its own result it shows, whatever joins the parts of that."""
    _, cache, _ = clean(way, format, layout)
    own = pages(cache, *([ROW] if cache.table is None else cache.table[ROW]))
    assert is_spoiled(check(way, format, layout, OWN, cache=spoil(cache, name, own, value)))


@pytest.mark.parametrize("name, value", [("k", np.inf), ("v", np.nan)], ids=["k", "v"])
@over(RUNS)
def test_padding(way, format, layout, name, value):
    """Such as the end of a page that another row has used."""
    _, cache, _ = clean(way, format, layout)
    check(way, format, layout, NONE, cache=spoil(cache, name, padding(cache), value))


@over([run for run in RUNS if run[2] == "pages"])
def test_pages_of_nobody(way, format, layout):
    """Page 0 is one that tables name."""
    _, cache, _ = clean(way, format, layout)
    assert (cache.table == 0).any()
    free = pages(cache, *np.setdiff1d(np.arange(cache.k.shape[0]), cache.table[cache.table > 0]))
    spoiled = spoil(spoil(cache, "k", free, np.nan), "v", free, np.inf)
    check(way, format, layout, NONE, cache=spoiled)


@pytest.mark.parametrize("hit", [OWN, PADDING], ids=["row", "padding"])
@over(RUNS)
def test_queries(way, format, layout, hit):
    q, *_ = clean(way, format, layout)
    check(way, format, layout, hit, q=jnp.where(hit[:, None, :, None], jnp.nan, q).astype(q.dtype))
