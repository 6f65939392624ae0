"""Continuous batching: which tokens of which requests the next step takes.

A step gives each row some real tokens, the rest padding: a row in prefill takes up to a chunk of
its prompt, a row in decode its last token. Rows never wait for each other. They share the cache's
pages: a request joins when a row is free and the pages for all its tokens are.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.generation.request import ERROR, Request, Token
from jaxmoe.generation.sampling import NO_TOKEN, request_hash
from jaxmoe.model.kv_cache import Cache, pages_a_group, pages_for, row_groups
from jaxmoe.model.steps import Inputs, chunk_width


class Batch(NamedTuple):
    """What one step is given; arrays of one number a row, beside the new tokens."""

    inputs: Inputs
    restart: jax.Array  # rows that begin a new request, or have none
    last: jax.Array  # index of the row's last real token
    request: jax.Array  # hash of the request's id
    index: jax.Array  # tokens generated so far


@dataclasses.dataclass
class Row:
    """A row of the batch while it serves a request.

    Attributes:
        after: tokens of a document that the request comes after.
        started: whether the row's cache is the request's own.
        fed: tokens of the request that the model has been given.
        written: the answer so far.
    """

    request: Request
    after: int
    started: bool
    fed: int = 0
    written: list[int] = dataclasses.field(default_factory=list)

    def next_tokens(self, most: int) -> list[int]:
        """What the model has not been given yet, cut to `most` tokens."""
        prompt = self.request.tokens[self.fed : self.fed + most]
        start = max(0, self.fed - len(self.request.tokens))
        return [*prompt, *self.written[start : start + most - len(prompt)]]

    @property
    def pending(self) -> int:
        """How many tokens the model has not been given yet."""
        return len(self.request.tokens) + len(self.written) - self.fed

    def finish_reason(self, stop_ids: tuple[int, ...]) -> str | None:
        """Why the answer ends with its last token; None if it goes on."""
        if self.written[-1] == NO_TOKEN:
            return ERROR
        if self.written[-1] in stop_ids:
            return "stop"
        return "length" if len(self.written) == self.request.max_new_tokens else None


class FreePages:
    """How many pages of the cache are free, by groups of rows that share them."""

    def __init__(self, cache: Cache, rows: int):
        """All pages are free."""
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
        """Gives the pages of a request back."""
        self.free[row // self.rows_a_group] += pages_for(request.length)


class Scheduler:
    """Gives rows to requests, and each step its tokens: `admit`, `next_batch`, run it, `commit`.

    Attributes:
        waiting: the requests that have no row yet, in their order.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        cache: Cache,
        rows: int,
        *,
        after: int,
        prefill_chunk: int,
        stop_ids: tuple[int, ...],
        padding: int,
    ):
        """Begins with all rows free.

        Args:
            cache: of that many rows; only its size is looked at.
            after: tokens of a document that every request comes after.
            prefill_chunk: prompt tokens that a row takes in one step, at most.
            stop_ids: tokens that end an answer.
            padding: the token that fills rows up.
        """
        self.waiting = collections.deque(requests)
        self._rows: list[Row | None] = [None] * rows
        self._pages = FreePages(cache, rows)
        longest = max(len(request.tokens) for request in self.waiting)
        self._chunk = chunk_width(prefill_chunk, longest)
        self._after, self._stop_ids, self._padding = after, stop_ids, padding

    @property
    def busy(self) -> bool:
        """Whether requests are waiting or in work."""
        return bool(self.waiting) or any(self._rows)

    def admit(self) -> None:
        """Gives free rows to waiting requests, as long as there are pages for them."""
        for i, row in enumerate(self._rows):
            if row is None and self.waiting and self._pages.reserve(i, self.waiting[0]):
                request = self.waiting.popleft()
                self._rows[i] = Row(request, self._after, started=self._after > 0)

    def next_batch(self) -> Batch:
        """Each row's next tokens: as wide as a chunk if one is in prefill, else one token."""
        rows = self._rows
        decoding = all(row is None or row.pending == 1 for row in rows)
        width = 1 if decoding else self._chunk
        tokens = np.full((len(rows), width), self._padding, np.int32)
        positions, segment_ids = np.zeros_like(tokens), np.zeros_like(tokens)
        restart, last, request, index = np.zeros((4, len(rows)), np.int32)
        request = request.astype(np.uint32)
        for i, row in enumerate(rows):
            if row is None:
                restart[i] = True  # gives its pages back
                continue
            new = row.next_tokens(width)
            tokens[i, : len(new)] = new
            first = row.after + row.fed
            positions[i, : len(new)] = np.arange(first, first + len(new))
            segment_ids[i, : len(new)] = 1
            restart[i], last[i] = not row.started, len(new) - 1
            request[i], index[i] = request_hash(row.request.id), len(row.written)
            row.started, row.fed = True, row.fed + len(new)
        inputs = Inputs(*map(jnp.asarray, (tokens, positions, segment_ids)))
        return Batch(inputs, *map(jnp.asarray, (restart, last, request, index)))

    def commit(self, chosen: list[int]) -> Iterator[Token]:
        """Adds each row's next token to its answer, where its whole prompt has been fed.

        Args:
            chosen: a token for each row.

        Yields:
            The tokens that were added; a row whose answer has ended is free afterwards.
        """
        for i, (row, token) in enumerate(zip(self._rows, chosen, strict=True)):
            if row is None or row.pending:
                continue
            row.written.append(token)
            reason = row.finish_reason(self._stop_ids)
            if reason:
                self._pages.release(i, row.request)
                self._rows[i] = None
            yield Token(row.request, token, reason)
