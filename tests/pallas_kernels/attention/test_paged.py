"""Attention of several sequences' queries, side by side, to a pool of pages, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import ChunkedMask, Coords, Mask, paged, paged_attention
from pallas_kernels.quantized import dequantize, quantize
from tests.pallas_kernels.hopper import INTERPRET, no_races

PAGE, PAGES, HEADS, KEY_HEADS, SIZE = 64, 24, 4, 2, 64
HELD, NEW = [5, 130, 0, 64, 200], [40, 1, 77, 3, 9]  # tokens of each sequence before, and new ones
QUERIES, LISTED = 192, 30  # places for queries and in the list of pages; the rest is padding


class Problem:
    """Sequences whose pages lie in any order in a pool; NaN where it has no token."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.q = rng.normal(size=(1, HEADS, QUERIES, SIZE))
        self.k, self.v = rng.normal(size=(2, PAGES, KEY_HEADS, PAGE, SIZE))
        self.position, self.segment = np.zeros((2, PAGES, PAGE), np.int32)
        self.q_coords = np.zeros((2, 1, QUERIES), np.int32)
        self.pages, self.owners = np.zeros((2, 1, LISTED), np.int32)
        free, queries, listed = rng.permutation(np.arange(1, PAGES)).tolist(), 0, 0
        for number, (held, new) in enumerate(zip(HELD, NEW, strict=True), start=1):
            place = np.arange(held + new)
            taken = np.array([free.pop() for _ in range(-(-len(place) // PAGE))])
            at = taken[place // PAGE], place % PAGE
            self.position[at], self.segment[at] = place, 1
            self.pages[0, listed : listed + len(taken)] = taken
            self.owners[0, listed : listed + len(taken)] = number
            self.q_coords[0, 0, queries : queries + new] = place[held:]
            self.q_coords[1, 0, queries : queries + new] = number
            queries, listed = queries + new, listed + len(taken)
        empty = (self.segment == 0)[:, None, :, None]
        self.v, self.k = (np.where(empty, np.nan, x) for x in (self.v, self.k))

    def where(self):
        q_coords, k_coords = Coords(*self.q_coords), Coords(self.position, self.segment)
        arrays = (*q_coords, *k_coords, self.pages, self.owners)
        a, b, c, d, pages, owners = (jnp.asarray(x, jnp.int32) for x in arrays)
        return Coords(a, b), Coords(c, d), pages, owners

    def expected(self, k, v, mask):
        """Output and log-sum-exp, one query after the other."""
        out, lse = np.zeros(self.q.shape), np.full(self.q.shape[:3], -np.inf)
        for i in np.flatnonzero(self.q_coords[1, 0]):
            position, owner = self.q_coords[:, 0, i]
            pages = self.pages[0][self.owners[0] == owner]
            seen = (self.position[pages] >= np.asarray(mask.first(position))) & (
                self.position[pages] <= position
            )
            seen &= self.segment[pages] != 0
            for head in range(HEADS):
                key_head = head // (HEADS // KEY_HEADS)
                keys, values = (x[pages][:, key_head][seen] for x in (k, v))
                scores = keys @ self.q[0, head, i] * SIZE**-0.5
                top = scores.max()
                weights = np.exp(scores - top)
                out[0, head, i] = weights @ values / weights.sum()
                lse[0, head, i] = top + np.log(weights.sum())
        return out, lse


@pytest.fixture(params=[Mask(), ChunkedMask(chunk=48)], ids=["causal", "chunks"])
def mask(request):
    return request.param


def check(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=tolerance)


@pytest.mark.parametrize("copied", [False, True], ids=["in place", "copied"])
def test_float32(mask, copied, monkeypatch):
    problem = Problem(0)
    if copied:  # what kernels that take rows run on, in three parts
        monkeypatch.setattr(paged, "_in_place", _copied)
    arrays = (jnp.asarray(x, jnp.float32) for x in (problem.q, problem.k, problem.v))
    found = paged_attention(*arrays, *problem.where(), scale=SIZE**-0.5, mask=mask)
    check(found, problem.expected(problem.k, problem.v, mask), 1e-5)


def _copied(scale, mask, *arguments):
    options = {"scale": scale, "mask": mask, "implementation": "xla"}
    return paged._copied(options, 5, *arguments)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_quantized(mask, format):
    problem = Problem(1)
    stored = [
        quantize(jnp.nan_to_num(jnp.asarray(x, jnp.float32)), format)
        for x in (problem.k, problem.v)
    ]
    wide = [np.asarray(dequantize(x, jnp.float32), np.float64) for x in stored]
    q = jnp.asarray(problem.q, jnp.float32)
    found = paged_attention(q, *stored, *problem.where(), scale=SIZE**-0.5, mask=mask)
    check(found, problem.expected(*wide, mask), 1e-5)


def test_mosaic_gpu(mask):
    """The Hopper kernel, for which pages are copied into rows of keys."""
    problem = Problem(2)
    problem.q, problem.k, problem.v = (
        np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
        for x in (problem.q, problem.k, problem.v)
    )
    arrays = (jnp.asarray(x, jnp.bfloat16) for x in (problem.q, problem.k, problem.v))
    options = {"implementation": "mosaic_gpu", "interpret": INTERPRET}
    with no_races():
        found = paged_attention(*arrays, *problem.where(), scale=SIZE**-0.5, mask=mask, **options)
        check(found, problem.expected(problem.k, problem.v, mask), 2e-2)
