"""Sequences in pages of a pool, and what their queries get from them in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import Coords
from pallas_kernels.quantized import LARGEST, dequantize, in_pairs, quantize

PAGE, PAGES, HEADS, KEY_HEADS, SIZE = 64, 24, 4, 2, 64
# Tokens of each sequence before, and new ones. The last has whole blocks that its queries all see.
HELD, NEW = [5, 130, 0, 64, 270], [40, 1, 77, 3, 59]
QUERIES, LISTED = 192, 30  # places for queries and in the list of pages; the rest is padding


class Problem:
    """Sequences whose pages lie in any order, those of the last one in turn; NaN for no token."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.q = rng.normal(size=(1, HEADS, QUERIES, SIZE))
        self.k, self.v = rng.normal(size=(2, PAGES, KEY_HEADS, PAGE, SIZE))
        self.position, self.segment = np.zeros((2, PAGES, PAGE), np.int32)
        self.q_coords = np.zeros((2, 1, QUERIES), np.int32)
        self.pages, self.owners = np.zeros((2, 1, LISTED), np.int32)
        free = [*range(PAGES - 1, 8, -1), *rng.permutation(np.arange(1, 9)).tolist()]
        queries, listed = 0, 0
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

    def arrays(self, dtype, format=None):
        """Queries and the pool; NaN, or a scale of NaN, where there is no token.

        int4 lies in pairs, as in the model's cache.
        """
        q, k, v = (jnp.asarray(x, dtype) for x in (self.q, self.k, self.v))
        if format:
            k, v = (in_pairs(quantize(x, format)) for x in (k, v))

        def spoil(leaf):
            if leaf.dtype == jnp.int8:
                return leaf
            empty = (self.segment == 0).reshape(PAGES, 1, PAGE, *[1] * (leaf.ndim - 3))
            return jnp.where(empty, jnp.nan, leaf.astype(jnp.float32)).astype(leaf.dtype)

        return q, *(jax.tree.map(spoil, x) for x in (k, v))

    def where(self):
        """Coordinates of queries and keys, pages and their segments, as the function takes them."""
        q_coords, k_coords = Coords(*self.q_coords), Coords(self.position, self.segment)
        return jax.tree.map(jnp.asarray, (q_coords, k_coords, self.pages, self.owners))

    def of(self, number):
        """Which queries are those of a sequence."""
        return self.q_coords[1, 0] == number

    def pages_of(self, number):
        """The pages of one sequence, by its number, in the order of its keys."""
        return self.pages[0][self.owners[0] == number]

    def expected(self, q, k, v, mask):
        """Output and log-sum-exp, one query after the other."""
        q, k, v = (as_float64(x) for x in (q, k, v))
        out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
        for i in np.flatnonzero(self.q_coords[1, 0]):
            position, owner = self.q_coords[:, 0, i]
            pages = self.pages_of(owner)
            seen = (self.position[pages] >= np.asarray(mask.first(position))) & (
                self.position[pages] <= position
            )
            seen &= self.segment[pages] != 0
            for head in range(HEADS):
                key_head = head // (HEADS // KEY_HEADS)
                keys, values = (x[pages][:, key_head][seen] for x in (k, v))
                scores = keys @ q[0, head, i] * SIZE**-0.5
                top = scores.max()
                weights = np.exp(scores - top)
                out[0, head, i] = weights @ values / weights.sum()
                lse[0, head, i] = top + np.log(weights.sum())
        return out, lse

    def rows(self, x):
        """Queries [1, H, S, ...] as [B, H, most, ...]: a row for each sequence, then zeros."""
        rows = np.zeros((len(NEW), x.shape[1], max(NEW), *x.shape[3:]), x.dtype)
        for row, new in enumerate(NEW):
            rows[row, :, :new] = np.asarray(x)[0][:, self.of(row + 1)]
        return rows

    def where_in_rows(self):
        """As `where`, with a row for each sequence, whose tokens have the segment 1."""
        position, segment = (self.rows(x[:, None])[:, 0] for x in self.q_coords)
        table = np.zeros((len(NEW), max(np.bincount(self.owners[0])[1:])), np.int32)
        for row in range(len(NEW)):
            pages = self.pages_of(row + 1)
            table[row, : len(pages)] = pages
        q_coords = Coords(position, (segment != 0).astype(np.int32))
        return jax.tree.map(jnp.asarray, (q_coords, Coords(self.position, self.segment), table))


def as_float64(x):
    wide = dequantize(x) if getattr(x, "format", None) in LARGEST else x
    return np.asarray(wide.astype(jnp.float32), np.float64)
