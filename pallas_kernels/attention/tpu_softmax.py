"""A running softmax over blocks of pages, on TPUs: few queries of each key head.

Shape letters are those of `decode_tpu`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.attention.masks import Coords, KeyRange
from pallas_kernels.attention.merge import lse_weight
from pallas_kernels.attention.tpu_int4 import (
    by_place,
    for_each_place,
    halves,
    of_places,
    own_numbers,
)
from pallas_kernels.tpu import SUBLANES, dot, increase, smallest

MASKED = -1e30
LOG2E = math.log2(math.e)


class Static(NamedTuple):
    """What the kernel knows when it is compiled.

    Attributes:
        scale: of scores, for powers of two.
        queries: S.
        quantized: whether keys and values have scales.
        parts: in how many parts the head size is stored.
        places: how many keys a row of a page has: 1, or 2 of int4 (see `tpu_int4`).
        fp8: the type in which int4 is multiplied, as `low_halves` makes it; None for the queries'.
    """

    scale: float
    queries: int
    quantized: bool
    parts: int = 1
    places: int = 1
    fp8: Any = None

    @property
    def stored_as(self) -> float:
        """What a number of the cache is, over the one that stands for it in products."""
        return 1.0 if self.fp8 is None else 1 / smallest(self.fp8)


class Softmax(NamedTuple):
    """A running softmax of each key head of the current row; r is R or, for two places, 2R."""

    top: Any  # [K, r, LANES] the maximum, as a power of two
    total: Any
    acc: Any  # [K, parts, r, numbers of a row of a page]

    def clear(self) -> None:
        """Starts a row."""
        self.top[...] = jnp.full_like(self.top, MASKED)
        self.total[...] = jnp.zeros_like(self.total)
        self.acc[...] = jnp.zeros_like(self.acc)

    def write(self, static: Static, out_ref, lse_ref) -> None:
        """Writes output [H, d] and log-sum-exp [H, LANES], of all key heads' queries."""
        heads = self.total.shape[0]
        rows = out_ref.shape[0] // heads
        for head in range(heads):
            at = slice(head * rows, (head + 1) * rows)
            top, total, parts = self._joined(static, head, rows)
            seen = total > 0
            total = jnp.where(seen, total, 1.0)
            out_ref[at] = jnp.concatenate(parts, -1) * static.stored_as / total[:, :1]
            lse_ref[at] = jnp.where(seen, (top + jnp.log2(total)) / LOG2E, -jnp.inf)

    def _joined(self, static: Static, head: int, rows: int):
        """The maximum and the total of a head's queries, and the parts of their sums."""
        top, total, acc = self.top[head], self.total[head], list(self.acc[head])
        if static.places == 1:
            return top, total, acc
        tops, totals = (of_places(x, rows) for x in (top, total))
        top = jnp.maximum(*tops)
        weights = [jnp.exp2(each - top) for each in tops]

        def joined(each):
            return sum(x * weight[:, :1] for x, weight in zip(each, weights, strict=True))

        total = sum(x * weight for x, weight in zip(totals, weights, strict=True))
        return top, total, [joined(own_numbers(x, rows)) for x in acc]


def join_cores(
    out: Float[Array, "C B H d"], lse: Float[Array, "C B H lanes"], *, interpret=None
) -> tuple[Float[Array, "B H d"], Float[Array, "B H"]]:
    """What all cores have of each row; the log-sum-exp is repeated along lanes."""
    cores, rows, *_ = out.shape
    together = next(n for n in (16, 8, 4, 2, 1) if rows % n == 0)

    def spec(x, *core):
        return pl.BlockSpec((*core, together, *x.shape[2:]), lambda i: (*(0,) * len(core), i, 0, 0))

    out, lse = pl.pallas_call(
        _join,
        out_shape=[jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (out, lse)],
        grid=(rows // together,),
        in_specs=[spec(out, cores), spec(lse, cores)],
        out_specs=[spec(out), spec(lse)],
        interpret=interpret or False,
        name="join_cores",
    )(out, lse)
    return out, lse[..., 0]


def _join(out_ref, lse_ref, joined_ref, joined_lse_ref) -> None:
    each = range(out_ref.shape[0])
    lse = [lse_ref[core] for core in each]
    top = functools.reduce(jnp.maximum, lse)
    weights = [lse_weight(x, top) for x in lse]
    total = functools.reduce(jnp.add, weights)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    mixed = (out_ref[core] * weights[core][..., :1] for core in each)
    joined_ref[...] = functools.reduce(jnp.add, mixed) / total[..., :1]
    joined_lse_ref[...] = jnp.where(seen, top + jnp.log(total), -jnp.inf)


class PageMask(NamedTuple):
    """What queries see of a page: scores [R, t], and which values [t, 1] are those of tokens.

    int4 of no token is no NaN, and so `real` is None of it.
    """

    seen: jax.Array
    real: jax.Array | None

    def of_tokens(self, values: jax.Array) -> jax.Array:
        """Values with zeros where there is no token."""
        return values if self.real is None else jnp.where(self.real, values, jnp.zeros_like(values))


def of_queries(values, row, queries: int, rows: int) -> jax.Array:
    """A number of each query of a row, as a column [R, 1]; a head's queries lie together."""
    query = lax.broadcasted_iota(jnp.int32, (rows, 1), 0) % queries
    column = jnp.full((rows, 1), values[row * queries], jnp.int32)
    for other in range(1, queries):
        column = jnp.where(query == other, values[row * queries + other], column)
    return column


def page_masks(static: Static, coords: Coords, filled, queries: KeyRange) -> list[PageMask]:
    """What a row's queries see of a block's pages, or of the lines of keys in pairs.

    Args:
        coords: references to those of a block's pages, [N, t].
        filled: how many of the block's first pages were copied.
        queries: what each query sees, as columns [R, 1].
    """
    if static.places == 1:
        return [
            _page_mask(coords, page, filled, queries) for page in range(coords.segment.shape[0])
        ]
    page = lax.broadcasted_iota(jnp.int32, coords.segment.shape, 0)
    segment = by_place(jnp.where(page < filled, coords.segment[...], 0))
    position = by_place(coords.position[...])

    def of_line(line: int) -> PageMask:
        seen = [
            _sees(queries, *(x[place, line : line + 1] for x in (position, segment)))
            for place in range(static.places)
        ]
        return PageMask(jnp.concatenate(seen), None)

    return [of_line(line) for line in range(segment.shape[1])]


def _page_mask(coords: Coords, page: int, filled, queries: KeyRange) -> PageMask:
    position, segment = (x[page : page + 1] for x in coords)
    segment = jnp.where(page < filled, segment, 0)
    real = jnp.broadcast_to(segment, (SUBLANES, segment.shape[1])).T[:, :1] != 0
    return PageMask(_sees(queries, position, segment), real)


def _sees(queries: KeyRange, position: jax.Array, segment: jax.Array) -> jax.Array:
    """Which keys [1, t] queries [R, 1] see."""
    seen = (position >= queries.first) & (position <= queries.last)
    return seen & (segment == queries.segment) & (segment != 0)


class Stored(NamedTuple):
    """Keys or values of a head in a block.

    Attributes:
        static: of the kernel.
        head: the key head's index.
        numbers: a reference to [N, K, t, d], or of int4 [N, K, t / places, row].
        scales: a reference to [N, K, t], or for two places [2, N / 2, K, t]; None without scales.
    """

    static: Static
    head: int
    numbers: Any
    scales: Any

    @property
    def lines(self) -> int:
        """How many pages there are, or for two places how many times two."""
        return self.numbers.shape[0] // self.static.places

    def widened(self, line: int, dtype) -> Sequence[jax.Array]:
        """A line's numbers as products take them, in each part of the head size."""
        pages = range(line, self.numbers.shape[0], self.lines)
        x = [self.numbers[page, self.head] for page in pages]
        return widen(x[0] if len(x) == 1 else jnp.concatenate(x), dtype, self.static)

    def scale(self, line: int, rows: int) -> jax.Array | None:
        """The scales of a line's keys, [1, t], or for two places [rows, t]."""
        head = slice(self.head, self.head + 1)
        if self.scales is None or self.static.places == 1:
            return None if self.scales is None else self.scales[line, head]
        of_place = rows // self.static.places
        scales = (self.scales[place, line, head] for place in range(self.static.places))
        return jnp.concatenate([jnp.broadcast_to(x, (of_place, x.shape[1])) for x in scales])


def parts_of_queries(static: Static, q: jax.Array) -> list[jax.Array]:
    """Queries [R, d] as each part of keys is multiplied with."""
    width = q.shape[1] // static.parts
    parts = [q[:, i * width : (i + 1) * width] for i in range(static.parts)]
    return parts if static.places == 1 else [for_each_place(x).astype(q.dtype) for x in parts]


def attend_head(
    q: Sequence[jax.Array],
    k: Stored,
    v: Stored,
    masks: Sequence[PageMask] | None,
    begins,
    softmax: Softmax,
) -> None:
    """Adds a block's keys to a key head's softmax, with the maximum of all of them at once.

    Args:
        q: queries, as `parts_of_queries` makes them.
        k: keys.
        v: values.
        masks: of the lines; None where every query sees every key.
        begins: whether the block is the row's first.
        softmax: of the key head.
    """
    static, (rows, _), dtype = k.static, q[0].shape, q[0].dtype
    scale = static.scale * static.stored_as
    more = (
        0 if static.fp8 is None else functools.reduce(jnp.add, (increase(x, static.fp8) for x in q))
    )

    def scores_of(line: int):
        keys = k.widened(line, dtype)
        products = (dot(x, y, transposed=True) for x, y in zip(q, keys, strict=True))
        scores = functools.reduce(jnp.add, products) - more
        k_scale = k.scale(line, rows)
        scores *= scale if k_scale is None else scale * k_scale
        return scores if masks is None else jnp.where(masks[line].seen, scores, MASKED)

    scores = list(map(scores_of, range(k.lines)))
    old = jnp.where(begins, MASKED, softmax.top[...])
    top = functools.reduce(jnp.maximum, scores).max(-1, keepdims=True)
    top = jnp.maximum(old, jnp.ceil(top))  # a power of two: see `power_of_two_above`
    shrink = jnp.exp2(old - top)
    total = weighed = jnp.zeros(scores[0].shape, jnp.float32)
    acc = [jnp.where(begins, 0.0, softmax.acc[i]) * shrink[:, :1] for i in range(static.parts)]
    for line in range(k.lines):
        p = jnp.exp2(scores[line] - top[:, :1])
        mask = None if masks is None else masks[line]
        values = v.widened(line, dtype)
        if mask is not None:
            p = jnp.where(mask.seen, p, 0.0)
            values = [mask.of_tokens(x) for x in values]
        total += p
        v_scale = v.scale(line, rows)
        if v_scale is not None:
            p = p * v_scale if mask is None else jnp.where(mask.seen, p * v_scale, 0.0)
        p = p.astype(dtype)
        if static.fp8 is not None:
            weighed += p.astype(jnp.float32)
        acc = [x + dot(p, y) for x, y in zip(acc, values, strict=True)]
    softmax.top[...] = top
    before = jnp.where(begins, 0.0, softmax.total[...])
    softmax.total[...] = before * shrink + total.sum(-1, keepdims=True)
    more = 0 if static.fp8 is None else increase(weighed, static.fp8)
    for i, x in enumerate(acc):
        softmax.acc[i] = x - more


def multiplied_as_stored(stored, dtype) -> bool:
    """Whether products of queries of a type take keys as stored: the matrix unit widens fp8."""
    return stored == dtype or (stored == jnp.float8_e4m3fn and dtype == jnp.bfloat16)


def widen(x: jax.Array, dtype, static: Static) -> Sequence[jax.Array]:
    """Stored keys or values [t, row] as products take them, without their scales."""
    if static.parts > 1:
        return halves(x, dtype, static.fp8)
    return [x if multiplied_as_stored(x.dtype, dtype) else x.astype(dtype)]
