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
from jaxmoe.model.kv_cache.layer import LayerCache, attend_pages
from jaxmoe.model.kv_cache.layout import PAGE
from jaxmoe.model.kv_cache.pages import Pool
from jaxmoe.model.sequence import NewTokens, gather
from pallas_kernels.attention import Coords, Mask, decode_attention, flash_attention, merge


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

    def size(self, room: Room) -> PoolSize:
        """Pages for the span of each row, or for the tokens of all rows if that is less."""
        columns = self.span // self.page
        pages = room.rows * columns
        if room.tokens is not None:
            full = FullCache().size(room)
            # What fits there fits here too; a row's first and last page may be begun.
            fits = -(-(full.pages - 1) * PAGE * room.shards // self.page) + 2 * room.rows
            pages = max(columns, min(pages, fits))
        return PoolSize(columns, 1 + pages, self.page, room.groups, 1)

    def slots(self, pool: Pool, new: Coords, order: jax.Array, shards: int) -> jax.Array:
        """Slots for the tokens that their row's last one sees, since a later one sees no others."""
        real = new.segment != 0
        index = jnp.arange(real.shape[1])
        last = jnp.max(jnp.where(real, index, 0), axis=1, keepdims=True)
        position, segment = (jnp.take_along_axis(c, last, axis=1) for c in new)
        kept = (new.segment == segment) & (new.position >= self.mask.first(position))
        return jnp.where(real & kept, new.position % self.span, -1)

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
        """Writes one new token first; attends of several to the ring before them and to themselves.

        Writing would overwrite what the first of several tokens still see, so the two parts are
        computed apart and merged. Where no token needs another device's keys, devices hold
        different stale keys in slots that no later query sees.
        """
        k, v = gather((k, v), axes, tokens.needs_gather)
        new_cache = cache.write(k, v, step.index[0])
        table, shared = step.pool.table[0], options._asdict()
        if k.shape[2] == 1:
            where = (tokens.own, step.pool.coords)
            return decode_attention(q, *new_cache, *where, table=table, **shared), new_cache
        past = attend_pages(options, q, cache, tokens.own, step.before, table)
        present = flash_attention(
            q, k, v, tokens.own, tokens.all, in_order=not axes, return_lse=True, **shared
        )
        out = merge([past, present])  # pyrefly: ignore  # pairs, since return_lse
        # Without this barrier XLA writes all layers' rings last, and keeps their keys until then.
        return lax.optimization_barrier((out, new_cache))
