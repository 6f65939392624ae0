"""The full cache: every token of each row, in the order of arrival.

A row's pages are dealt out in turn over the devices of the `slots` axis, each row's from another
device on, so that any prefix of a long row and any set of short ones lie evenly on all of them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmoe import mesh as meshes
from jaxmoe.model.kernels import AttentionOptions
from jaxmoe.model.kv_cache.kind import CacheKind, CacheStep, PoolSize, Room
from jaxmoe.model.kv_cache.layer import LayerCache, attend_pieces, attend_rows, attend_single
from jaxmoe.model.kv_cache.layout import PAGE, pool_pages
from jaxmoe.model.packing import PackedRows, merge_single
from jaxmoe.model.sequence import NewTokens, gather, merge_over_devices
from pallas_kernels.attention import Coords


@dataclasses.dataclass(frozen=True)
class FullCache(CacheKind):
    """Keeps every token; layers whose queries see any distance need it."""

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return PAGE

    @property
    def sharded(self) -> bool:
        """The devices of the `slots` axis share each row's pages."""
        return True

    @property
    def shares(self) -> bool:
        """Tokens stay where they are."""
        return True

    def pages_for(self, tokens: int, shards: int) -> int:
        """How many pages of each device hold all tokens, which are dealt out over the devices."""
        return -(-tokens // (PAGE * shards))

    def size(self, room: Room) -> PoolSize:
        """Pages for the capacity of each row, or for the tokens of all rows if that is less."""
        columns = room.capacity // (PAGE * room.shards)
        pages = room.rows * columns
        if room.tokens is not None:
            begun = room.rows  # each row may begin a page
            pages = max(columns, min(pages, -(-room.tokens // (PAGE * room.shards)) + begun))
        return PoolSize(columns, pool_pages(pages), PAGE, room.groups * room.shards, room.shards)

    def slots(
        self, new: Coords, last: Coords, order: jax.Array, dealt: jax.Array, shards: int
    ) -> jax.Array:
        """Tokens in order, counted over the row's pages on this device."""
        if shards == 1:
            return order
        page, me = order // PAGE, lax.axis_index(meshes.RULES["slots"])
        here = (order >= 0) & ((page + dealt) % shards == me)
        return jnp.where(here, page // shards * PAGE + order % PAGE, -1)

    def attend(
        self,
        options: AttentionOptions,
        axes: tuple[str, ...],
        q: Float[Array, "B H S d"],
        k: Float[Array, "B K S d"],
        v: Float[Array, "B K S d"],
        tokens: NewTokens,
        cache: LayerCache,
        step: CacheStep,
    ) -> tuple[Any, LayerCache]:
        """Writes first, then attends to this device's pages and merges over devices."""
        k, v, q = gather((k, v, q), axes)
        cache = cache.write(k, v, step.index[0])
        where = (tokens.all, step.pool.coords)
        table = step.table[0]
        if tokens.all_rows is not None:
            out, lse = _attend_packed(options, q, cache, *where, tokens.all_rows, step)
        else:
            out, lse = attend_rows(options, q, cache, *where, table)
        return merge_over_devices(out, lse, axes).astype(q.dtype), cache


def _attend_packed(
    options, q, cache, coords: Coords, page_coords, rows: PackedRows, step: CacheStep
):
    """Single tokens as in decoding, pieces of prompts as in prefill."""
    single = attend_single(options, q, cache, coords, page_coords, rows, step.table[0])
    pieces = attend_pieces(options, q, cache, rows.pieces(coords), page_coords, step.pieces)
    return [merge_single(rows, one, many, 2) for one, many in zip(single, pieces, strict=True)]
