"""Continuous batching: rows take requests as they become free, and one step serves all rows.

A step gives each row some real tokens, the rest padding: a row that reads its prompt takes up to a
segment of it, a row that writes takes its last token. Rows never wait for each other.
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
from jaxmoe.generate.sampling import Sampling, request_hash, sample
from jaxmoe.model.cache import init_cache, restart_rows, round_capacity
from jaxmoe.model.transformer import forward, unembed

SEGMENT = 512  # tokens of a prompt read in one step, at most


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt as tokens, and how many more are wanted, at most."""

    id: object
    tokens: tuple[int, ...]
    max_new_tokens: int


class Token(NamedTuple):
    """One generated token; `finish_reason` is `stop` or `length` on a request's last, else None."""

    request: Request
    token: int
    finish_reason: str | None


@dataclasses.dataclass
class _Row:
    """A row of the batch while it serves a request."""

    request: Request
    started: bool = False
    read: int = 0  # tokens that the model has seen
    written: list[int] = dataclasses.field(default_factory=list)

    def next_tokens(self, most: int) -> list[int]:
        prompt = self.request.tokens[self.read : self.read + most]
        start = max(0, self.read - len(self.request.tokens))
        return [*prompt, *self.written[start : start + most - len(prompt)]]

    @property
    def pending(self) -> int:
        return len(self.request.tokens) + len(self.written) - self.read


class _Batch(NamedTuple):
    """What one step feeds, [rows, tokens] or [rows]."""

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    restart: jax.Array  # rows that begin a new request
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
) -> Iterator[Token]:
    """Runs requests on the current mesh; yields tokens as they come, requests interleaved.

    The requests are checked at once, and run as the result is consumed, under the same mesh.

    Args:
        rows: requests that are in work at once, at most.
        segment: prompt tokens a row reads in one step, at most.
        stop_ids: tokens that end an answer; default: the config's.

    Raises:
        UserError: for an empty prompt, one that leaves no room in the context, a token that is not
            in the vocabulary, or no rows.
    """
    if rows < 1:
        raise UserError(f"rows {rows} is below 1.")
    stop_ids = config.eos_token_ids if stop_ids is None else stop_ids
    waiting = collections.deque(fit_context(config, request) for request in requests)
    return _run(config, params, waiting, sampling, rows, segment, stop_ids)


def _run(
    config: Llama4Config,
    params: dict,
    waiting: collections.deque[Request],
    sampling: Sampling,
    rows: int,
    segment: int,
    stop_ids: tuple[int, ...],
) -> Iterator[Token]:
    if not waiting:
        return
    longest = max(len(request.tokens) for request in waiting)
    segment = min(segment, 1 << (longest - 1).bit_length())
    batch: list[_Row | None] = [None] * min(rows, len(waiting))
    cache = _new_cache(config, params, waiting, len(batch))
    while waiting or any(batch):
        batch = [row or (_Row(waiting.popleft()) if waiting else None) for row in batch]
        fed = _fill(config, batch, segment)
        chosen, cache = step(config, sampling, params, cache, fed)
        for i, (row, token) in enumerate(zip(batch, np.asarray(chosen).tolist(), strict=True)):
            if row is None or row.pending:
                continue
            row.written.append(token)
            reason = _finish_reason(row, token, stop_ids)
            yield Token(row.request, token, reason)
            if reason:
                batch[i] = None


def fit_context(config: Llama4Config, request: Request) -> Request:
    """The request with `max_new_tokens` cut to the model's context.

    Raises:
        UserError: if it has no tokens, no room, or tokens that are not in the vocabulary.
    """
    room = config.max_position_embeddings - len(request.tokens)
    if not request.tokens:
        raise UserError(f"request {request.id!r} has no tokens; give it a prompt.")
    if request.max_new_tokens < 1:
        raise UserError(f"request {request.id!r} asks for {request.max_new_tokens} new tokens.")
    if room < 1:
        raise UserError(
            f"request {request.id!r} has a prompt of {len(request.tokens)} tokens, which leaves no "
            f"room in the model's context of {config.max_position_embeddings}; shorten it."
        )
    for token in request.tokens:
        if not 0 <= token < config.vocab_size:
            raise UserError(
                f"request {request.id!r} holds token {token}; the vocabulary is 0 to "
                f"{config.vocab_size - 1}."
            )
    return dataclasses.replace(request, max_new_tokens=min(room, request.max_new_tokens))


def _new_cache(config: Llama4Config, params: dict, requests: Iterable[Request], rows: int):
    longest = max(len(request.tokens) + request.max_new_tokens for request in requests)
    return init_cache(config, rows, round_capacity(longest), params["embed"].dtype)


def _fill(config: Llama4Config, rows: list[_Row | None], segment: int) -> _Batch:
    """Takes each row's next tokens: one wide step while a prompt is being read, else one token."""
    width = 1 if all(row is None or row.pending == 1 for row in rows) else segment
    tokens = np.full((len(rows), width), config.pad_token_id % config.vocab_size, np.int32)
    positions, segment_ids = np.zeros_like(tokens), np.zeros_like(tokens)
    restart, last, request, index = np.zeros((4, len(rows)), np.int32)
    request = request.astype(np.uint32)
    for i, row in enumerate(rows):
        if row is None:
            continue
        new = row.next_tokens(width)
        tokens[i, : len(new)] = new
        positions[i, : len(new)] = np.arange(row.read, row.read + len(new))
        segment_ids[i, : len(new)] = 1
        restart[i], last[i] = not row.started, len(new) - 1
        request[i], index[i] = request_hash(row.request.id), len(row.written)
        row.started, row.read = True, row.read + len(new)
    fed = (tokens, positions, segment_ids, restart, last, request, index)
    return _Batch(*map(jnp.asarray, fed))


def _finish_reason(row: _Row, token: int, stop_ids: tuple[int, ...]) -> str | None:
    if token in stop_ids:
        return "stop"
    return "length" if len(row.written) == row.request.max_new_tokens else None
