"""Long texts that the model is given once: a cache of one row, and how many tokens it holds."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

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
from jaxmoe.model.steps import prefill
from pallas_kernels.attention import Coords

PREFILL_CHUNK = 2048  # tokens that one step takes, at most


class Document(NamedTuple):
    """A text that the model has seen, from position 0 on; made under the mesh it is used on.

    Attributes:
        cache: a cache of one row.
        length: tokens of the text that the cache holds.
    """

    cache: Cache
    length: int

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return capacity_of(self.cache) - self.length


def new_document(config: Llama4Config, params: dict, capacity: int, kv: str | None = None):
    """An empty document.

    Args:
        capacity: how many tokens the text, a question about it and the answer have together.
        kv: how keys and values are stored; default: as parameters.

    Raises:
        UserError: for a capacity beyond the model's context, or an unknown `kv`.
    """
    check_length(config, capacity)
    return Document(init_cache(config, 1, round_capacity(capacity), kv or params["embed"].dtype), 0)


def check_length(config: Llama4Config, length: int) -> None:
    """Raises a UserError if `length` is below 1 or above the model's context."""
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
    prefill_chunk: int = PREFILL_CHUNK,
    boundary: int | None = None,
) -> Iterator[Document]:
    """Feeds the rest of a text to the model; memory is that of the cache and of one chunk.

    Args:
        document: what the model has seen so far, which is used up: only the last one is valid.
        tokens: the whole text.
        prefill_chunk: tokens that one step takes, at most.
        boundary: a chunk ends at every multiple of this.

    Yields:
        The document after each chunk.
    """
    row = np.asarray(tokens, np.int32)[None]
    size = {"chunk": prefill_chunk, "start": document.length, "boundary": boundary}
    for done, _, cache in prefill(config, params, row, document.cache, **size):
        assert cache is not None
        yield Document(cache, done)


class Snapshot(NamedTuple):
    """A copy of what added tokens overwrite in a cache: the rings of its local layers."""

    length: int
    pools: tuple[Pool, ...]  # but that of the full cache
    rings: tuple[LayerCache, ...]


def snapshot(config: Llama4Config, document: Document) -> Snapshot:
    """A copy of the local layers' part, for `restore`."""
    cache = document.cache
    kept = (cache.pools[1:], _rings(config, cache))
    return Snapshot(document.length, *jax.tree.map(jnp.copy, kept))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def restore(config: Llama4Config, cache: Cache, before: Snapshot) -> Cache:
    """The cache as it was at the snapshot; nothing of later tokens can be seen any more."""
    rings = iter(before.rings)
    layers = tuple(
        next(rings) if keeps_ring(config, kind) else layer
        for kind, layer in zip(config.layers, cache.layers, strict=True)
    )
    cache = truncate(cache, jnp.full_like(cache.length, before.length))
    return cache._replace(layers=layers, pools=(cache.full, *before.pools))


@functools.partial(jax.jit, donate_argnums=0)
def truncate(cache: Cache, length: Int[Array, "1"]) -> Cache:
    """A cache of one row without its tokens from position `length` on, which is used up.

    A token in a ring overwrites one that is a chunk, or a sliding window, before it. So the dropped
    tokens must be of one chunk with the last that stays; else, and with sliding windows always,
    take a `snapshot` before they are added.

    Args:
        cache: of one row, with one segment.
        length: tokens that stay, at most as many as there are.
    """

    def kept(pool: Pool) -> Pool:
        position, segment = pool.coords
        return pool._replace(coords=Coords(position, jnp.where(position < length, segment, 0)))

    return cache._replace(pools=tuple(map(kept, cache.pools)), length=length)


def _rings(config: Llama4Config, cache: Cache) -> tuple[LayerCache, ...]:
    pairs = zip(config.layers, cache.layers, strict=True)
    return tuple(layer for kind, layer in pairs if keeps_ring(config, kind))
