"""Continuous batching: rows take requests as they become free, and one step serves all rows.

A step gives each row some real tokens, the rest padding: a row that reads its prompt takes up to a
segment of it, a row that writes takes its last token. Rows never wait for each other. They share
the cache's pages: a request joins when a row is free and the pages for all its tokens are.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation.document import Document, bookmark, rewind
from jaxmoe.generation.sampling import NO_TOKEN, Sampling, request_hash, sample
from jaxmoe.model.kv_cache import (
    Cache,
    init_cache,
    pages_a_group,
    pages_for,
    restart_rows,
    round_capacity,
    row_groups,
)
from jaxmoe.model.transformer import forward, unembed

SEGMENT = 512  # tokens of a prompt read in one step, at most


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt as tokens, and how many more are wanted, at most."""

    id: object
    tokens: tuple[int, ...]
    max_new_tokens: int

    @property
    def length(self) -> int:
        """Tokens at the end, at most."""
        return len(self.tokens) + self.max_new_tokens


ERROR = "error"


class Token(NamedTuple):
    """One generated token.

    Attributes:
        token: `NO_TOKEN` if the logits were not finite.
        finish_reason: on a request's last token `stop`, `length`, or `ERROR` if the logits were not
            finite; else None.
    """

    request: Request
    token: int
    finish_reason: str | None


@dataclasses.dataclass
class _Row:
    """A row of the batch while it serves a request."""

    request: Request
    after: int = 0  # tokens of a document that it comes after
    started: bool = False
    read: int = 0  # tokens of its own that the model has seen
    written: list[int] = dataclasses.field(default_factory=list)

    def next_tokens(self, most: int) -> list[int]:
        prompt = self.request.tokens[self.read : self.read + most]
        start = max(0, self.read - len(self.request.tokens))
        return [*prompt, *self.written[start : start + most - len(prompt)]]

    @property
    def pending(self) -> int:
        return len(self.request.tokens) + len(self.written) - self.read


class _Pages:
    """Which requests the pages of the cache have room for; each group of rows has its own."""

    def __init__(self, cache: Cache, rows: int):
        groups = row_groups(rows)
        self.free, self.rows_a_group = [pages_a_group(cache)] * groups, rows // groups

    def reserve(self, row: int, request: Request) -> bool:
        """Takes the pages for all tokens of a request, if there are enough."""
        group, pages = row // self.rows_a_group, pages_for(request.length)
        if pages > self.free[group]:
            return False
        self.free[group] -= pages
        return True

    def release(self, row: int, request: Request) -> None:
        self.free[row // self.rows_a_group] += pages_for(request.length)


class _Batch(NamedTuple):
    """What one step feeds, [rows, tokens] or [rows]."""

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    restart: jax.Array  # rows that begin a new request, or have none
    last: jax.Array  # index of the row's last real token
    request: jax.Array  # hash of the request's id
    index: jax.Array  # tokens generated so far


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def step(config: Llama4Config, sampling: Sampling, params, cache, batch: _Batch):
    """Feeds a batch and samples each row's next token; returns (tokens [rows], cache)."""
    cache = restart_rows(cache, batch.restart)
    out = forward(config, params, batch.tokens, batch.positions, batch.segment_ids, cache)
    last = jnp.take_along_axis(out.hidden, batch.last[:, None, None], axis=1)[:, 0]
    logits = unembed(config, params, last)
    return sample(sampling, logits, batch.request, batch.index), out.cache


def generate(
    config: Llama4Config,
    params: dict,
    requests: Iterable[Request],
    sampling: Sampling,
    *,
    rows: int = 8,
    segment: int = SEGMENT,
    stop_ids: tuple[int, ...] | None = None,
    kv: str | None = None,
    cache_tokens: int | None = None,
    document: Document | None = None,
) -> Iterator[Token]:
    """Runs requests on the current mesh; yields tokens as they come, requests interleaved.

    The requests are checked at once, and run as the result is consumed, under the same mesh.

    Args:
        rows: requests that are in work at once, at most.
        segment: prompt tokens a row reads in one step, at most.
        stop_ids: tokens that end an answer; default: the config's.
        kv: how keys and values are stored: "bf16", "int8", "fp8" or "int4"; default: as parameters.
        cache_tokens: that all rows together can hold; requests wait for room. Default: enough that
            none waits.
        document: a text that each request comes after, one request at a time; its cache is used
            and used up. `rows`, `kv` and `cache_tokens` are then the document's.

    Raises:
        UserError: for an empty prompt, one that leaves no room in the context, a token that is not
            in the vocabulary, no rows, an unknown `kv`, or a request that the cache cannot hold.
    """
    if rows < 1:
        raise UserError(f"rows {rows} is below 1.")
    stop_ids = config.eos_token_ids if stop_ids is None else stop_ids
    after = 0 if document is None else document.length
    waiting = collections.deque(fit_context(config, request, after) for request in requests)
    if not waiting:
        return iter(())
    if document is not None:
        _check_room(document, waiting)
        return _run(config, params, document, waiting, sampling, 1, segment, stop_ids)
    rows = min(rows, len(waiting))
    cache = _new_cache(config, kv or params["embed"].dtype, waiting, rows, cache_tokens)
    empty = Document(cache, 0)
    return _run(config, params, empty, waiting, sampling, rows, segment, stop_ids)


def _run(
    config: Llama4Config,
    params: dict,
    document: Document,
    waiting: collections.deque[Request],
    sampling: Sampling,
    rows: int,
    segment: int,
    stop_ids: tuple[int, ...],
) -> Iterator[Token]:
    longest = max(len(request.tokens) for request in waiting)
    segment = min(segment, 1 << (longest - 1).bit_length())
    batch: list[_Row | None] = [None] * rows
    cache, after = document
    place = bookmark(config, document) if after and len(waiting) > 1 else None
    pages = _Pages(cache, rows)
    while waiting or any(batch):
        for i, row in enumerate(batch):
            if row is None and waiting and pages.reserve(i, waiting[0]):
                batch[i] = _Row(waiting.popleft(), after, started=after > 0)
        fed = _fill(config, batch, segment)
        chosen, cache = step(config, sampling, params, cache, fed)
        for i, (row, token) in enumerate(zip(batch, np.asarray(chosen).tolist(), strict=True)):
            if row is None or row.pending:
                continue
            row.written.append(token)
            reason = _finish_reason(row, token, stop_ids)
            yield Token(row.request, token, reason)
            if reason:
                pages.release(i, row.request)
                batch[i] = None
                if place is not None and waiting:
                    cache = rewind(config, cache, place)


def _check_room(document: Document, requests: Iterable[Request]) -> None:
    longest = max(requests, key=lambda request: request.length)
    if longest.length > document.room:
        raise UserError(
            f"the document's cache has room for {document.room} more tokens, but request "
            f"{longest.id!r} takes {longest.length}; load it with more room, or ask for fewer."
        )


def fit_context(config: Llama4Config, request: Request, after: int = 0) -> Request:
    """The request with `max_new_tokens` cut to the model's context.

    Args:
        after: tokens of a document that it comes after.

    Raises:
        UserError: if it has no tokens, no room, or tokens that are not in the vocabulary.
    """
    room = config.max_position_embeddings - after - len(request.tokens)
    if not request.tokens:
        raise UserError(f"request {request.id!r} has no tokens; give it a prompt.")
    if request.max_new_tokens < 1:
        raise UserError(f"request {request.id!r} asks for {request.max_new_tokens} new tokens.")
    if room < 1:
        raise UserError(
            f"request {request.id!r} has a prompt of {after + len(request.tokens)} tokens, which "
            f"leaves no room in the model's context of {config.max_position_embeddings}; "
            "shorten it."
        )
    for token in request.tokens:
        if not 0 <= token < config.vocab_size:
            raise UserError(
                f"request {request.id!r} holds token {token}; the vocabulary is 0 to "
                f"{config.vocab_size - 1}."
            )
    return dataclasses.replace(request, max_new_tokens=min(room, request.max_new_tokens))


def _new_cache(
    config: Llama4Config, dtype, requests: Iterable[Request], rows: int, tokens: int | None
) -> Cache:
    """By default with room for the longest requests in all rows."""
    lengths = sorted((request.length for request in requests), reverse=True)
    if tokens is not None and tokens < lengths[0]:
        raise UserError(
            f"a cache of {tokens} tokens has no room for a request of {lengths[0]}; use more, or "
            "ask for fewer new tokens."
        )
    groups = row_groups(rows)
    tokens = groups * sum(lengths[: rows // groups]) if tokens is None else tokens
    return init_cache(config, rows, round_capacity(lengths[0]), dtype, tokens=tokens)


def _fill(config: Llama4Config, rows: list[_Row | None], segment: int) -> _Batch:
    """Takes each row's next tokens: one wide step while a prompt is being read, else one token."""
    width = 1 if all(row is None or row.pending == 1 for row in rows) else segment
    tokens = np.full((len(rows), width), config.pad_token_id % config.vocab_size, np.int32)
    positions, segment_ids = np.zeros_like(tokens), np.zeros_like(tokens)
    restart, last, request, index = np.zeros((4, len(rows)), np.int32)
    request = request.astype(np.uint32)
    for i, row in enumerate(rows):
        if row is None:
            restart[i] = True  # gives its pages back
            continue
        new = row.next_tokens(width)
        tokens[i, : len(new)] = new
        first = row.after + row.read
        positions[i, : len(new)] = np.arange(first, first + len(new))
        segment_ids[i, : len(new)] = 1
        restart[i], last[i] = not row.started, len(new) - 1
        request[i], index[i] = request_hash(row.request.id), len(row.written)
        row.started, row.read = True, row.read + len(new)
    fed = (tokens, positions, segment_ids, restart, last, request, index)
    return _Batch(*map(jnp.asarray, fed))


def _finish_reason(row: _Row, token: int, stop_ids: tuple[int, ...]) -> str | None:
    if token == NO_TOKEN:
        return ERROR
    if token in stop_ids:
        return "stop"
    return "length" if len(row.written) == row.request.max_new_tokens else None
