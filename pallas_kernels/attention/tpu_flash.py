"""A running softmax of a tile of many queries over blocks of keys, on TPUs.

Shape letters are those of `paged_tpu`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention.masks import Coords, KeyRange
from pallas_kernels.attention.tpu_int4 import (
    halves,
    in_order_of_places,
    keys_in_order_of_places,
)
from pallas_kernels.attention.tpu_softmax import LOG2E, MASKED
from pallas_kernels.tpu import LANES, SUBLANES, dot

LEAST = MASKED / 2  # a maximum of no scores: below it, masked ones have probability 0


class Static(NamedTuple):
    """What the kernel knows when it is compiled.

    Attributes:
        scale: of scores, for powers of two.
        heads: how many heads' queries are multiplied at once.
        format: of a quantized cache; None for floating numbers.
        owned: whether the list of blocks says the segments of pages.
        paired: whether int4 keys are, which then are multiplied in the order of their places.
    """

    scale: float
    heads: int
    format: str | None
    owned: bool
    paired: bool

    def row(self, rows: Iterable[jax.Array]) -> jax.Array:
        """Numbers of pages' keys [1, t] as one row [1, T], in the order of the products."""
        return joined(in_order_of_places(x) if self.paired else x for x in rows)


class Softmax(NamedTuple):
    """A running softmax of each query of a tile."""

    top: Any  # [G, q, LANES] the maximum, as a power of two
    total: Any  # [G, q, LANES] each the sum of every 128th probability
    acc: Any  # [G, q, d]

    def clear(self) -> None:
        """Starts a tile."""
        self.top[...] = jnp.full_like(self.top, LEAST)
        self.total[...] = jnp.zeros_like(self.total)
        self.acc[...] = jnp.zeros_like(self.acc)

    def add(self, heads, scores: jax.Array, weigh: Callable, values: jax.Array) -> None:
        """Adds a block of keys.

        Args:
            heads: the slice of heads whose scores these are.
            scores: [heads * q, T], for powers of two.
            weigh: makes the weights of values from their probabilities.
            values: [T, d].
        """
        old, total, acc = (x[heads].reshape(len(scores), -1) for x in self)
        top = jnp.maximum(old, jnp.ceil(scores.max(-1, keepdims=True)))  # see `power_of_two_above`
        shrink = jnp.exp2(old - top)
        # By vectors of LANES keys: to repeat the maximum for all of them would take other units.
        parts = [jnp.exp2(x - top) for x in _vectors(scores)]
        total = total * shrink + functools.reduce(jnp.add, parts)
        acc = acc * shrink[:, :1] + dot(weigh(joined(parts)), values)
        for mine, new in zip(self, (top, total, acc), strict=True):
            mine[heads] = new.reshape(mine[heads].shape)

    def finish(self, head, real: jax.Array) -> jax.Array:
        """Divides a head's output by its sum, and gives the log-sum-exp [1, q].

        Args:
            real: [q, 1], which queries are no padding.
        """
        total = self.total[head].sum(-1, keepdims=True)
        seen = real & (total != 0)
        total = jnp.where(seen, total, 1.0)
        self.acc[head] = jnp.where(seen, self.acc[head] / total, 0.0)
        lse = jnp.where(seen, (self.top[head] + jnp.log2(total)) / LOG2E, -jnp.inf)
        return lse.T[:1]


class BlockMask(NamedTuple):
    """What the queries of a tile see of a block of keys.

    Attributes:
        queries: [q, 1].
        keys: [1, T]; those of segment 0 are seen by none.
        spoiled: [1, T] NaN for keys whose values are not finite, else 0.
    """

    queries: KeyRange
    keys: Coords
    spoiled: jax.Array

    def apply(self, scores: jax.Array) -> jax.Array:
        """Scores [heads * q, T], MASKED where a query does not see a key."""
        heads = len(scores) // len(self.queries.first)
        first, last, segment = (jnp.concatenate([x] * heads) for x in self.queries)
        position, of_key = self.keys
        seen = (position >= first) & (position <= last) & (of_key == segment) & (of_key != 0)
        return jnp.where(seen, scores + self.spoiled, MASKED)


class KeyBlock(NamedTuple):
    """A block's keys and values as they are multiplied.

    Attributes:
        k, v: references to [T, d] or [N, t, d].
        k_scale, v_scale: [1, T]; None for a cache that has none.
        mask: None where every query sees every key.
    """

    k: Any
    v: Any
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    mask: BlockMask | None = None

    def masked(self, queries: KeyRange, keys: Coords, spoiled: jax.Array) -> "KeyBlock":
        """The block with a mask.

        A sequence's NaN stay its own as in `keep_apart`: its values are zeros, and its scores NaN
        for those that see them.

        Args:
            queries, keys: as in `BlockMask`.
            spoiled: [1, T], which values are not finite but for their scales.
        """
        v_scale = self.v_scale
        if v_scale is not None:
            finite = jnp.abs(v_scale) < jnp.inf
            spoiled = spoiled | ~finite
            v_scale = jnp.where(finite, v_scale, 0.0)
        mask = BlockMask(queries, keys, jnp.where(spoiled, jnp.nan, 0.0))
        return self._replace(v_scale=v_scale, mask=mask)


def attend_block(static: Static, q_ref, block: KeyBlock, softmax: Softmax) -> None:
    """Adds a block to the softmax of all heads [G, q, d], some at a time."""
    group, _, d = q_ref.shape

    def weigh(p: jax.Array) -> jax.Array:
        return (p if block.v_scale is None else p * block.v_scale).astype(q_ref.dtype)

    @pl.loop(0, group // static.heads)
    def _(i):
        heads = pl.ds(i * static.heads, static.heads)
        keys, values = (x[...].reshape(-1, d) for x in (block.k, block.v))
        scores = dot(q_ref[heads].reshape(-1, d), keys, transposed=True)
        scores *= static.scale if block.k_scale is None else static.scale * block.k_scale
        scores = scores if block.mask is None else block.mask.apply(scores)
        softmax.add(heads, scores, weigh, values)


def widen_block(static: Static, k, v, wide, *, masked: bool) -> jax.Array:
    """Writes a block's keys and values [N, t, ...] in the queries' type to `wide` [2, T, d].

    Of a masked block, elements of values that are not finite become zeros.

    Returns:
        [1, T]: which values had such elements.
    """
    keys, values = (_widened(static, x[...], wide.dtype) for x in (k, v))
    wide[0] = keys.astype(wide.dtype)
    if not masked or static.format in ("int8", "int4"):
        wide[1] = values.astype(wide.dtype)
        return jnp.zeros((1, len(values)), bool)
    values = values.astype(jnp.float32)
    finite = jnp.abs(values) < jnp.inf
    wide[1] = jnp.where(finite, values, 0.0).astype(wide.dtype)
    bad = jnp.where(finite, 0.0, 1.0).astype(wide.dtype)
    ones = jnp.ones((2 * SUBLANES, bad.shape[1]), wide.dtype)
    return dot(ones, bad, transposed=True)[:1] > 0  # a product, since it gives a row of sums


def _widened(static: Static, x: jax.Array, dtype) -> jax.Array:
    """Keys or values of pages [N, ...] as rows [T, d]."""
    if static.paired:
        return keys_in_order_of_places(x, dtype)
    x = x.reshape(-1, x.shape[-1])
    return jnp.concatenate(halves(x, dtype, None), -1) if static.format == "int4" else x


def column(row: jax.Array) -> jax.Array:
    """[1, n] as [n, 1]."""
    return jnp.broadcast_to(row, (SUBLANES, row.shape[1])).T[:, :1]


def joined(rows: Iterable[jax.Array]) -> jax.Array:
    """Arrays [r, t] as one, along their last axis."""
    return jnp.concatenate(list(rows), 1)


def _vectors(x: jax.Array) -> list[jax.Array]:
    """[r, T] as arrays [r, LANES]."""
    return [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
