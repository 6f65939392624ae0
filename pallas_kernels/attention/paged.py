"""`paged_attention`: many queries of several sequences, side by side, against a cache in pages."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.arrays import pad_axis
from pallas_kernels.attention.block_pairs import Pairs, chosen
from pallas_kernels.attention.flash import flash_attention, flash_implementation
from pallas_kernels.attention.flash_xla import FlashXlaConfig, Keys, Queries, attend_pairs
from pallas_kernels.attention.masks import (
    CAUSAL,
    NOTHING,
    Coords,
    Extents,
    Mask,
    extents,
    joined_extents,
    pad_tokens,
    visible_blocks,
)
from pallas_kernels.attention.merge import merge_with_lse
from pallas_kernels.attention.pages import keep_apart, rows_of_pages
from pallas_kernels.platform import target
from pallas_kernels.quantized import Quantized, dequantize

COPIED = 8192  # keys that are copied out of their pages at a time for kernels that take rows


def paged_attention(
    q: Float[Array, "1 H S d"],
    k: Float[Array, "P K t d"] | Quantized,
    v: Float[Array, "P K t d"] | Quantized,
    q_coords: Coords,
    k_coords: Coords,
    pages: Int[Array, "1 M"],
    segments: Int[Array, "1 M"],
    *,
    scale: float,
    mask: Mask = CAUSAL,
    implementation: str | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "1 H S d"], Float[Array, "1 H S"]]:
    """`flash_attention` to keys in pages of a pool; output and log-sum-exp, both float32.

    It is not differentiable.

    Args:
        q: queries of several sequences, whose segments are in ascending order.
        k, v: the pool, arrays or quantized with a scale a token and head.
        q_coords: positions and segments of the queries.
        k_coords: positions of the pool's keys [P, t]; segment 0 where there is none.
        pages: the sequences' pages, each sequence's together and in the order of the queries.
        segments: the segment that the keys of each page have here; 0 for a page without keys, all
            of which come last.
        scale, mask: as for `flash_attention`.
        implementation: "xla", which reads the pages where they lie, or one of
            `flash_attention`'s, for which they are copied, some at a time; None for the fastest.
        interpret: as for `flash_attention`.
    """
    at_once = max(1, COPIED // k.shape[2])
    keys = jax.ShapeDtypeStruct((1, k.shape[1], at_once * k.shape[2], k.shape[3]), q.dtype)
    one: Any = jax.ShapeDtypeStruct((1, keys.shape[2]), jnp.int32)
    coords = Coords(one, one)
    options = {"scale": scale, "mask": mask, "interpret": interpret}
    options["implementation"] = implementation
    by = flash_implementation(q, keys, keys, q_coords, coords, return_lse=True, **options)
    where = (q_coords, k_coords, pages, segments)
    if by == "xla" and target().platform != "gpu":  # whose host would wait for every pair
        return _in_place(scale, mask, q, k, v, *where)
    return _copied(options | {"implementation": by}, at_once, q, k, v, *where)


def _copied(options: dict[str, Any], at_once: int, q, k, v, q_coords, k_coords, pages, segments):
    """Copies some pages at a time into a row of keys, and joins what they give."""
    pages, segments = (pad_axis(x, 1, at_once) for x in (pages, segments))

    def part(i):
        cut = functools.partial(lax.dynamic_slice_in_dim, slice_size=at_once, axis=1)
        taken, owner = (cut(x, i * at_once) for x in (pages, segments))
        keys = _keys_of(k, v, k_coords, taken, owner, q.dtype)
        out, lse = flash_attention(q, *keys[:2], q_coords, keys.coords, return_lse=True, **options)
        return out, lse

    used = -(-jnp.sum(segments != 0) // at_once)
    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf)
    out, lse = lax.fori_loop(0, used, lambda i, state: merge_with_lse([state, part(i)]), nothing)
    return out, lse


def _in_place(scale: float, mask: Mask, q, k, v, q_coords, k_coords, pages, segments):
    """A loop over pairs of a block of queries and one of pages, of which some query sees a key."""
    config, (_, H, S, d), K = FlashXlaConfig(), q.shape, k.shape[1]
    block_q = min(config.block_q, S)
    at_once = max(1, min(pages.shape[1], config.block_k // k.shape[2]))
    pages, segments = (pad_axis(x, 1, at_once) for x in (pages, segments))
    q_range = pad_tokens(mask.key_range(q_coords), block_q)
    q_BKGSd = pad_axis(q, 2, block_q).reshape(1, K, H // K, -1, d)

    def queries_of(i):
        cut = functools.partial(
            lax.dynamic_slice_in_dim, start_index=i * block_q, slice_size=block_q
        )
        return Queries(cut(q_BKGSd, axis=3), jax.tree.map(lambda x: cut(x, axis=1), q_range))

    def keys_of(j):
        cut = functools.partial(lax.dynamic_slice_in_dim, slice_size=at_once, axis=1)
        taken, owner = (cut(x, j * at_once) for x in (pages, segments))
        return _keys_of(k, v, k_coords, taken, owner, q.dtype)

    pairs = _visible_pairs(q_range, block_q, k_coords, pages, segments, at_once)
    out, lse = attend_pairs(scale, q_BKGSd, queries_of, keys_of, pairs, part=True)
    return out.reshape(1, H, -1, d)[:, :, :S], lse.reshape(1, H, -1)[:, :, :S]


def _keys_of(k, v, k_coords: Coords, pages, segments, dtype) -> Keys:
    """Keys and values of some pages as a row, with the segments that the pages have."""
    *keys, coords = rows_of_pages(k, v, k_coords, pages)
    owner = jnp.repeat(segments, k_coords.segment.shape[1], axis=1)
    k, v = (dequantize(x, dtype) if isinstance(x, Quantized) else x.astype(dtype) for x in keys)
    return Keys(
        *keep_apart(k, v), coords._replace(segment=jnp.where(coords.segment != 0, owner, 0))
    )


def _visible_pairs(q_range, block_q: int, k_coords, pages, segments, at_once: int) -> Pairs:
    """Blocks of queries and of pages of which some query may see some key."""
    first, last, _, _, whole = (x[pages, 0] for x in extents(k_coords, k_coords.segment.shape[1]))
    real = (first <= last) & (segments != 0)
    by_page = (first, last, segments, segments, whole)
    extent = (jnp.where(real, x, nothing) for x, nothing in zip(by_page, NOTHING, strict=True))
    some, _ = visible_blocks(q_range, joined_extents(Extents(*extent), at_once), block_q)
    i, j = (jnp.asarray(x.reshape(-1), jnp.int32) for x in np.indices(some.shape[1:]))
    return chosen(Pairs(i, j, len(i)), some[0].reshape(-1))
