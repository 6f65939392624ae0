"""Long texts that the model is given once: a cache of one row, and how many tokens it holds."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation.request import Request, check_adapter, other_adapter
from jaxmoe.model.adapters import one_adapter
from jaxmoe.model.kv_cache import (
    PAGE,
    Cache,
    capacity_of,
    init_cache,
    round_capacity,
    slot_shards,
    truncate_rows,
)
from jaxmoe.model.steps import Place, prefill, without_features

PREFILL_CHUNK = 2048  # tokens that one step takes, at most

truncate = jax.jit(truncate_rows, donate_argnums=0)


class Document(NamedTuple):
    """A text that the model has seen, from position 0 on; made under the mesh it is used on.

    Attributes:
        cache: a cache of one row.
        length: tokens of the text that the cache holds.
        adapter: the name of the adapter that they were read with, and that every request after them
            has; None for none by name.
    """

    cache: Cache
    length: int
    adapter: str | None = None

    @property
    def room(self) -> int:
        """Tokens that may still be added, or that a request after it may have."""
        page = PAGE * self.cache.full.table.shape[0]
        return capacity_of(self.cache) - page - self.length


def new_document(
    config: Llama4Config,
    params: dict,
    capacity: int,
    kv: str | None = None,
    adapter: str | None = None,
) -> Document:
    """An empty document.

    Args:
        capacity: how many tokens the text and all questions that are asked at once have together,
            with their answers.
        kv: how keys and values are stored; default: as parameters.
        adapter: the name of the one to read with, of several; None for none of them.

    Raises:
        UserError: for a capacity beyond the model's context, or an unknown `kv`.
    """
    check_length(config, capacity)
    return Document(init_document(config, capacity, kv or params["embed"].dtype), 0, adapter)


def check_adapters(
    requests: Sequence[Request], names: Sequence[str], document: Document | None
) -> None:
    """Raises a UserError unless each request's adapter is one of the names, or none.

    After a document it has to be the document's.
    """
    for request in requests:
        check_adapter(request, names)
        if document is not None and request.adapter != document.adapter:
            raise other_adapter(request)


def init_document(config: Llama4Config, capacity: int, dtype) -> Cache:
    """An empty cache for a document; arguments as for `new_document`.

    Where requests go on from a text that ends within a page, they have a copy of that page.
    """
    return init_cache(config, 1, round_capacity(capacity + PAGE * slot_shards()), dtype)


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
    place: Place = without_features,
) -> Iterator[Document]:
    """Feeds the rest of a text to the model; memory is that of the cache and of one chunk.

    Args:
        document: what the model has seen so far, which is used up: only the last one is valid.
        tokens: the whole text.
        prefill_chunk: tokens that one step takes, at most.
        boundary: a chunk ends at every multiple of this.
        place: as for `jaxmoe.model.steps.prefill`, where the text has images.

    Yields:
        The document after each chunk.

    Raises:
        UserError: if the model has no adapter of the document's name.
    """
    row, own = np.asarray(tokens, np.int32)[None], one_adapter(params, document.adapter)
    size = {"chunk": prefill_chunk, "start": document.length, "boundary": boundary}
    for done, _, cache in prefill(config, own, row, document.cache, place=place, **size):
        assert cache is not None
        yield document._replace(cache=cache, length=done)
