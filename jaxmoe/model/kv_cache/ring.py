"""The ring: of each row the tokens that its next one may see, where a mask bounds their number.

The slot of a token is its position modulo the mask's span, so that a token overwrites one
that no later query sees: a chunk for chunked layers, a window for sliding ones.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmoe.model.kernels import AttentionOptions
from jaxmoe.model.kv_cache.full import FullCache
from jaxmoe.model.kv_cache.kind import CacheKind, CacheStep, PoolSize, Room
from jaxmoe.model.kv_cache.layer import LayerCache, attend_pieces, attend_single
from jaxmoe.model.kv_cache.layout import PAGE, pool_pages
from jaxmoe.model.packing import PackedRows, merge_single
from jaxmoe.model.sequence import NewTokens, gather
from pallas_kernels.attention import (
    Coords,
    Mask,
    decode_attention,
    flash_attention,
    merge,
    paged_attention,
)


@dataclasses.dataclass(frozen=True)
class RingCache(CacheKind):
    """Keeps as many tokens as a mask's span; every device of the `slots` axis has all of them.

    Attributes:
        mask: with a span.
    """

    mask: Mask

    @property
    def sharded(self) -> bool:
        """Every device of the `slots` axis has all of a row's pages."""
        return False

    @property
    def span(self) -> int:
        """Tokens of a row that are kept at most."""
        assert self.mask.span is not None
        return self.mask.span

    @property
    def page(self) -> int:
        """Tokens of a page; pages fill the span exactly."""
        return PAGE if self.span % PAGE == 0 else self.span

    @property
    def shares(self) -> bool:
        """Later tokens overwrite earlier ones."""
        return False

    def pages_for(self, tokens: int, shards: int) -> int:
        """How many pages hold the tokens, or the span if it is less; every device has them all."""
        return -(-min(tokens, self.span) // self.page)

    def size(self, room: Room) -> PoolSize:
        """Pages for the span of each row, or for the tokens of all rows if that is less."""
        columns = self.span // self.page
        pages, tokens = room.rows * columns, room.ring_tokens
        if tokens is None and room.tokens is not None:  # what fits there fits here too
            tokens = (FullCache().size(room).pages - 1) * PAGE * room.shards
        if tokens is not None:  # a row's first and last page may be begun
            fits = -(-tokens // self.page) + 2 * room.rows
            pages = max(columns, min(pages, fits))
        return PoolSize(columns, pool_pages(pages), self.page, room.groups, 1)

    def slots(
        self, new: Coords, last: Coords, order: jax.Array, dealt: jax.Array, shards: int
    ) -> jax.Array:
        """Slots for the tokens that their row's last one sees, since a later one sees no others."""
        kept = (new.segment == last.segment) & (new.position >= self.mask.first(last.position))
        return jnp.where((new.segment != 0) & kept, new.position % self.span, -1)

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
        """Writes tokens of one chunk first; attends of others to the ring before and to themselves.

        Writing would overwrite what the first of several tokens still see, so the two parts are
        computed apart and merged. Where no token needs another device's keys, devices hold
        different stale keys in slots that no later query sees.
        """
        k, v = gather((k, v), axes, tokens.needs_gather)
        if tokens.own_rows is not None:
            return _attend_packed(options, axes, q, k, v, tokens, tokens.own_rows, cache, step)
        new_cache = cache.write(k, v, step.index[0])
        table, shared = step.table[0], options._asdict()
        if step.before is None:
            where = (tokens.own, step.pool.coords)
            return decode_attention(q, *new_cache, *where, table=table, **shared), new_cache
        past = paged_attention(q, *cache, tokens.own, step.before, table, **shared)
        present = flash_attention(
            q, k, v, tokens.own, tokens.all, in_order=not axes, return_lse=True,
            **options.of_new_tokens(),
        )  # fmt: skip
        out = merge([past, present]).astype(q.dtype)  # pyrefly: ignore  # pairs, since return_lse
        # Without this barrier XLA writes all layers' rings last, and keeps their keys until then.
        return lax.optimization_barrier((out, new_cache))


def _attend_packed(
    options: AttentionOptions,
    axes: tuple[str, ...],
    q: Float[Array, "1 H S d"],
    k: Float[Array, "1 K T d"],
    v: Float[Array, "1 K T d"],
    tokens: NewTokens,
    rows: PackedRows,
    cache: LayerCache,
    step: CacheStep,
) -> tuple[Any, LayerCache]:
    """Single tokens after they are written, pieces of prompts before.

    Args:
        rows: of this device's tokens.
    """
    assert tokens.all_rows is not None and step.before is not None
    own = rows.pieces(tokens.own)
    past = attend_pieces(options, q, cache, own, step.before, step.pieces)
    # Written after the past is read, the ring is changed in place.
    past, cache = lax.optimization_barrier((past, cache))
    cache = cache.write(k, v, step.index[0])
    every = tokens.all_rows.pieces(tokens.all)
    present = flash_attention(
        q, k, v, own, every, in_order=not axes, return_lse=True, **options.of_new_tokens()
    )
    single, _ = attend_single(options, q, cache, tokens.own, step.pool.coords, rows, step.table[0])
    out = merge_single(rows, single, merge([past, present]), 2)  # pyrefly: ignore  # pairs
    return lax.optimization_barrier((out.astype(q.dtype), cache))
