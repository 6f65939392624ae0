"""`paged_attention`: many queries, of rows or of sequences side by side, to a cache in pages."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.arrays import pad_axis
from pallas_kernels.attention import paged_tpu
from pallas_kernels.attention.block_pairs import Pairs, chosen
from pallas_kernels.attention.flash import flash_attention, flash_implementation
from pallas_kernels.attention.flash_xla import FlashXlaConfig, Keys, Queries, attend_pairs
from pallas_kernels.attention.masks import (
    CAUSAL,
    Coords,
    Mask,
    extents,
    joined_extents,
    pad_tokens,
    visible_blocks,
)
from pallas_kernels.attention.merge import merge_with_lse
from pallas_kernels.attention.pages import (
    extents_of_rows,
    keep_apart,
    of_owners,
    rows_of_pages,
)
from pallas_kernels.choice import choose, resolve_config
from pallas_kernels.platform import target
from pallas_kernels.quantized import Quantized, dequantize, row_numbers

COPIED = 8192  # keys of several sequences that are copied out of their pages at a time
COPIED_ROWS = 2**16  # keys of all rows together that are, where each row is a sequence


@dataclasses.dataclass(frozen=True)
class PagedCase:
    """One call as known at trace time; arguments are explained at `paged_attention`."""

    rows: int
    heads: int
    kv_heads: int
    queries: int
    keys: int  # of a row's pages
    head_dim: int
    dtype: str
    cache: str  # "bfloat16", "float32", ..., or the format of a quantized cache
    page: int
    scale: float
    interpret: Any = None
    paired: bool = False  # whether int4 keys are

    @property
    def row(self) -> int:
        """How many stored numbers the last axis of the cache has."""
        return row_numbers(self.head_dim, self.cache, paired=self.paired)


def paged_attention(
    q: Float[Array, "B H S d"],
    k: Float[Array, "P K t d"] | Quantized,
    v: Float[Array, "P K t d"] | Quantized,
    q_coords: Coords,
    k_coords: Coords,
    pages: Int[Array, "B n"],
    segments: Int[Array, "B n"] | None = None,
    *,
    scale: float,
    mask: Mask = CAUSAL,
    implementation: str | None = None,
    config: Any = None,
    interpret: Any = None,
) -> tuple[Float[Array, "B H S d"], Float[Array, "B H S"]]:
    """`flash_attention` to keys in pages of a pool; output and log-sum-exp, both float32.

    It is not differentiable.

    Args:
        q: queries. With `segments` they are one row, of several sequences side by side whose
            segments are in ascending order.
        k, v: the pool, arrays or quantized with a scale a token and head.
        q_coords: positions and segments of the queries.
        k_coords: positions and segments of the pool's keys [P, t]; segment 0 where there is none.
        pages: the pages of each row, in order. Those past a row's end must be pages of padding.
            With `segments`, the pages of each sequence together, in the order of the queries.
        segments: the segment that the keys of each page have here; 0 for a page without keys, all
            of which come last. None: each token's own.
        scale, mask: as for `flash_attention`.
        implementation: "mosaic_tpu", which reads the pages where they lie, or one of
            `flash_attention`'s, for which they are copied, some at a time, but for "xla" with
            `segments`; None for the fastest.
        config: sizes for "mosaic_tpu"; default: those for the call.
        interpret: as for `flash_attention`, or for "mosaic_tpu" `pltpu.InterpretParams()`.
    """
    where = (q_coords, k_coords, pages, segments)
    case, tpu = _case(q, k, pages, scale, interpret), paged_tpu.IMPLEMENTATION
    if implementation == tpu.name or (implementation is None and tpu.why_not(case) is None):
        choose([tpu], case, tpu.name)
        config = resolve_config(tpu, case, config)
        return tpu.run(q, k, v, mask.key_range(q_coords), *where[1:], case, config)
    options = {"scale": scale, "mask": mask, "implementation": implementation}
    return _by_flash(options | {"interpret": interpret}, q, k, v, *where)


def _case(q, k, pages, scale: float, interpret) -> PagedCase:
    (B, H, S, d), (_, K, page, _) = q.shape, k.shape
    cache = k.format if isinstance(k, Quantized) else jnp.dtype(k.dtype).name
    keys, dtype = page * pages.shape[1], jnp.dtype(q.dtype).name
    paired = isinstance(k, Quantized) and k.paired
    return PagedCase(B, H, K, S, keys, d, dtype, cache, page, scale, interpret, paired)


def _by_flash(options: dict[str, Any], q, k, v, q_coords, k_coords, pages, segments):
    """By an implementation of `flash_attention`."""
    most = COPIED if segments is not None else COPIED_ROWS // len(q)
    at_once = min(max(1, most // k.shape[2]), pages.shape[1])
    keys = jax.ShapeDtypeStruct((len(q), k.shape[1], at_once * k.shape[2], k.shape[3]), q.dtype)
    one: Any = jax.ShapeDtypeStruct((len(q), keys.shape[2]), jnp.int32)
    by = flash_implementation(q, keys, keys, q_coords, Coords(one, one), return_lse=True, **options)
    where = (q_coords, k_coords, pages, segments)
    if segments is not None and by == "xla" and target().platform != "gpu":
        # On a GPU, whose host would wait for every pair, this would be slow.
        return _in_place(options["scale"], options["mask"], q, k, v, *where)
    return _copied(options | {"implementation": by}, at_once, q, k, v, *where)


class Listed(NamedTuple):
    """Pages of rows.

    Attributes:
        page: their indices.
        segment: that of the keys in each; None: each token's own.
        there: whether the row has the page; None: all are there.
    """

    page: Int[Array, "B n"]
    segment: Int[Array, "B n"] | None
    there: Bool[Array, "B n"] | None = None


def _copied(options: dict[str, Any], at_once: int, q, k, v, q_coords, k_coords, pages, segments):
    """Copies some pages of each row at a time into rows of keys, and joins what they give."""
    listed = Listed(pages, segments, jnp.ones(pages.shape, bool))
    listed = jax.tree.map(lambda x: pad_axis(x, 1, at_once), listed)

    def part(i):
        some = jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, i * at_once, at_once, axis=1), listed
        )
        keys = _keys_of(k, v, k_coords, some, q.dtype)
        out, lse = flash_attention(q, *keys[:2], q_coords, keys.coords, return_lse=True, **options)
        return out, lse

    if segments is None and listed.page.shape[1] == at_once:
        return part(0)
    used = -(-_used(k_coords, pages, segments) // at_once)
    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf)
    out, lse = lax.fori_loop(0, used, lambda i, state: merge_with_lse([state, part(i)]), nothing)
    return out, lse


def _used(k_coords: Coords, pages, segments):
    """How many columns of `pages` may have keys."""
    if segments is not None:
        return jnp.sum(segments != 0)
    holds = jnp.any(k_coords.segment != 0, 1)[pages]
    return jnp.max(jnp.where(holds, jnp.arange(1, pages.shape[1] + 1), 0))


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
        return _keys_of(k, v, k_coords, Listed(taken, owner), q.dtype)

    pairs = _visible_pairs(q_range, block_q, k_coords, pages, segments, at_once)
    out, lse = attend_pairs(scale, q_BKGSd, queries_of, keys_of, pairs, part=True)
    return out.reshape(1, H, -1, d)[:, :, :S], lse.reshape(1, H, -1)[:, :, :S]


def _keys_of(k, v, k_coords: Coords, listed: Listed, dtype) -> Keys:
    """Keys and values of some pages as rows, with the segments that they have here."""
    *keys, coords = rows_of_pages(k, v, k_coords, listed.page, listed.there)
    k, v = (dequantize(x, dtype) if isinstance(x, Quantized) else x.astype(dtype) for x in keys)
    if listed.segment is None:
        return Keys(k, v, coords)
    owner = jnp.repeat(listed.segment, k_coords.segment.shape[1], axis=1)
    owner = jnp.where(coords.segment != 0, owner, 0)
    return Keys(*keep_apart(k, v), coords._replace(segment=owner))


def _visible_pairs(q_range, block_q: int, k_coords, pages, segments, at_once: int) -> Pairs:
    """Blocks of queries and of pages of which some query may see some key."""
    by_page = extents_of_rows(extents(k_coords, k_coords.segment.shape[1]), pages)
    by_block = joined_extents(of_owners(by_page, segments), at_once)
    some, _ = visible_blocks(q_range, by_block, block_q)
    i, j = (jnp.asarray(x.reshape(-1), jnp.int32) for x in np.indices(some.shape[1:]))
    return chosen(Pairs(i, j, len(i)), some[0].reshape(-1))
