"""Long texts that are read once: a cache of one row, and how much of the text it holds."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.model.kv_cache import (
    Cache,
    LayerCache,
    Pool,
    capacity_of,
    init_cache,
    keeps_ring,
    round_capacity,
)
from jaxmoe.model.transformer import forward

SEGMENT = 2048  # tokens read at once


class Document(NamedTuple):
    """A text as the model has read it, from position 0 on; made under the mesh it is used on."""

    cache: Cache  # of one row
    length: int  # tokens of the text that the cache holds

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return capacity_of(self.cache) - self.length


def new_document(config: Llama4Config, params: dict, capacity: int, kv: str | None = None):
    """An empty document.

    Args:
        capacity: tokens of the text, of questions about it and of their answers.
        kv: how keys and values are stored; default: as parameters.

    Raises:
        UserError: for a capacity beyond the model's context, or an unknown `kv`.
    """
    check_length(config, capacity)
    return Document(init_cache(config, 1, round_capacity(capacity), kv or params["embed"].dtype), 0)


def check_length(config: Llama4Config, length: int) -> None:
    """Raises a UserError if so many tokens are none, or more than the model's context."""
    if not 1 <= length <= config.max_position_embeddings:
        raise UserError(
            f"{length} tokens do not fit the model's context of 1 to "
            f"{config.max_position_embeddings}; change the text."
        )


def read(
    config: Llama4Config,
    params: dict,
    document: Document,
    tokens: Sequence[int] | np.ndarray,
    *,
    segment: int = SEGMENT,
    pause: int | None = None,
) -> Iterator[Document]:
    """Reads the rest of a text; memory is that of the cache and of one segment.

    Args:
        document: what was read so far, which is used up: only the last one is valid.
        tokens: the whole text.
        pause: a segment ends at every multiple of this.

    Yields:
        The document after each segment.
    """
    width = min(segment, 1 << (len(tokens) - 1).bit_length())  # few shapes to compile
    while document.length < len(tokens):
        start = document.length
        stop = min(start + width, len(tokens))
        if pause is not None:
            stop = min(stop, (start // pause + 1) * pause)
        new = np.asarray(tokens[start:stop], np.int32)[None]
        new = np.pad(new, ((0, 0), (0, width - new.shape[1])))
        order = np.arange(new.shape[1], dtype=np.int32)[None]
        fed = (new, start + order, (order < stop - start).astype(np.int32))
        document = Document(_feed(config, params, document.cache, *map(jnp.asarray, fed)), stop)
        yield document


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _feed(config: Llama4Config, params, cache: Cache, tokens, positions, segment_ids) -> Cache:
    out = forward(config, params, tokens, positions, segment_ids, cache)
    assert out.cache is not None
    return out.cache


class Bookmark(NamedTuple):
    """What a cache loses when tokens are added: local layers overwrite, global layers append."""

    length: int
    pools: tuple[Pool, ...]  # but that of the full cache
    rings: tuple[LayerCache, ...]


def bookmark(config: Llama4Config, document: Document) -> Bookmark:
    """A copy of the local layers' part, to come back to."""
    cache = document.cache
    kept = (cache.pools[1:], _rings(config, cache))
    return Bookmark(document.length, *jax.tree.map(jnp.copy, kept))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def rewind(config: Llama4Config, cache: Cache, place: Bookmark) -> Cache:
    """The cache as it was at the bookmark; nothing of later tokens can be seen any more."""
    position, segment = cache.full.coords
    coords = cache.full.coords._replace(segment=jnp.where(position < place.length, segment, 0))
    rings = iter(place.rings)
    layers = tuple(
        next(rings) if keeps_ring(config, kind) else layer
        for kind, layer in zip(config.layers, cache.layers, strict=True)
    )
    length = jnp.full_like(cache.length, place.length)
    return Cache(layers, (cache.full._replace(coords=coords), *place.pools), length)


def _rings(config: Llama4Config, cache: Cache) -> tuple[LayerCache, ...]:
    pairs = zip(config.layers, cache.layers, strict=True)
    return tuple(layer for kind, layer in pairs if keeps_ring(config, kind))
