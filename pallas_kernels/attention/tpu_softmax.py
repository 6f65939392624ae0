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
from pallas_kernels.tpu import SUBLANES, dot

MASKED = -1e30
LOG2E = math.log2(math.e)


class Static(NamedTuple):
    """What the kernel knows when it is compiled.

    Attributes:
        scale: of scores, for powers of two.
        queries: S.
        parts: in how many parts the head size is stored.
        quantized: whether keys and values have scales.
    """

    scale: float
    queries: int
    parts: int
    quantized: bool


class Softmax(NamedTuple):
    """A running softmax of each key head of the current row."""

    top: Any  # [K, R, LANES] the maximum, as a power of two
    total: Any
    acc: Any  # [K, parts, R, d / parts]

    def clear(self) -> None:
        """Starts a row."""
        self.top[...] = jnp.full_like(self.top, MASKED)
        self.total[...] = jnp.zeros_like(self.total)
        self.acc[...] = jnp.zeros_like(self.acc)

    def write(self, out_ref, lse_ref) -> None:
        """Writes output [H, d] and log-sum-exp [H, LANES], of all key heads' queries."""
        heads, rows, _ = self.total.shape
        for head in range(heads):
            total, at = self.total[head], slice(head * rows, (head + 1) * rows)
            seen = total > 0
            total = jnp.where(seen, total, 1.0)
            parts = [self.acc[head, i] for i in range(self.acc.shape[1])]
            out_ref[at] = jnp.concatenate(parts, -1) / total[:, :1]
            lse_ref[at] = jnp.where(seen, (self.top[head] + jnp.log2(total)) / LOG2E, -jnp.inf)


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
    """What queries see of a page: scores [R, t], and which values [t, 1] are those of tokens."""

    seen: jax.Array
    real: jax.Array


def of_queries(values, row, queries: int, rows: int) -> jax.Array:
    """A number of each query of a row, as a column [R, 1]; a head's queries lie together."""
    query = lax.broadcasted_iota(jnp.int32, (rows, 1), 0) % queries
    column = jnp.full((rows, 1), values[row * queries], jnp.int32)
    for other in range(1, queries):
        column = jnp.where(query == other, values[row * queries + other], column)
    return column


def page_mask(coords: Coords, page: int, filled, queries: KeyRange) -> PageMask:
    """What a row's queries see of a page.

    Args:
        coords: references to those of a block's pages, [N, t].
        page: which of them.
        filled: how many of the block's first pages were copied.
        queries: what each query sees, as columns [R, 1].
    """
    position, segment = (x[page : page + 1] for x in coords)
    segment = jnp.where(page < filled, segment, 0)
    seen = (position >= queries.first) & (position <= queries.last)
    real = jnp.broadcast_to(segment, (SUBLANES, segment.shape[1])).T[:, :1] != 0
    return PageMask(seen & (segment == queries.segment) & (segment != 0), real)


def attend_head(
    static: Static,
    q: jax.Array,
    head: int,
    block: Sequence[Any],
    pages: Sequence[PageMask] | None,
    begins,
    softmax: Softmax,
) -> None:
    """Adds a block's pages to a key head's softmax, with the maximum of all of them at once.

    Args:
        q: [R, d].
        head: the key head's index.
        block: references to keys and values [N, K, t, d], each followed by its scales, if any.
        pages: masks of the pages; None where every query sees every key.
        begins: whether the block is the row's first.
        softmax: of the key head.
    """
    k, k_scale, v, v_scale = block if static.quantized else (block[0], None, block[1], None)
    count, scale = k.shape[0], static.scale
    width = q.shape[1] // static.parts
    q_parts = [q[:, i * width : (i + 1) * width] for i in range(static.parts)]

    def scores_of(page: int):
        keys = widen(k[page, head], q.dtype, static.parts)
        products = (dot(x, y, transposed=True) for x, y in zip(q_parts, keys, strict=True))
        scores = functools.reduce(jnp.add, products)
        scores *= scale if k_scale is None else scale * k_scale[page, head : head + 1]
        return scores if pages is None else jnp.where(pages[page].seen, scores, MASKED)

    scores = list(map(scores_of, range(count)))
    old = jnp.where(begins, MASKED, softmax.top[...])
    top = functools.reduce(jnp.maximum, scores).max(-1, keepdims=True)
    top = jnp.maximum(old, jnp.ceil(top))  # a power of two: see `power_of_two_above`
    shrink = jnp.exp2(old - top)
    total = jnp.zeros(scores[0].shape, jnp.float32)
    acc = [jnp.where(begins, 0.0, softmax.acc[i]) * shrink[:, :1] for i in range(static.parts)]
    for page in range(count):
        p = jnp.exp2(scores[page] - top[:, :1])
        values = widen(v[page, head], q.dtype, static.parts)
        if pages is not None:
            p = jnp.where(pages[page].seen, p, 0.0)
            values = [jnp.where(pages[page].real, x, jnp.zeros_like(x)) for x in values]
        total += p
        if v_scale is not None:
            scaled = p * v_scale[page, head : head + 1]
            p = scaled if pages is None else jnp.where(pages[page].seen, scaled, 0.0)
        acc = [x + dot(p.astype(q.dtype), y) for x, y in zip(acc, values, strict=True)]
    softmax.top[...] = top
    before = jnp.where(begins, 0.0, softmax.total[...])
    softmax.total[...] = before * shrink + total.sum(-1, keepdims=True)
    for i, x in enumerate(acc):
        softmax.acc[i] = x


def multiplied_as_stored(stored, dtype) -> bool:
    """Whether products of queries of a type take keys as stored: the matrix unit widens fp8."""
    return stored == dtype or (stored == jnp.float8_e4m3fn and dtype == jnp.bfloat16)


def widen(x: jax.Array, dtype, parts: int) -> list[jax.Array]:
    """Stored keys or values [t, d / parts] as products take them, without their scales."""
    if multiplied_as_stored(x.dtype, dtype):
        return [x]
    if parts == 1:
        return [x.astype(dtype)]
    x = x.astype(jnp.int32)
    return [half.astype(jnp.float32).astype(dtype) for half in ((x << 28) >> 28, x >> 4)]
