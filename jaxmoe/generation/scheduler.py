"""Continuous batching: which requests are in work, and from which prefixes they go on.

Every row that writes gets one token in every step; rows that read prompts share what is left of a
budget (`jaxmoe.generation.batches`). Rows share the cache's pages: a request joins when a row and
the pages for all its tokens are free. Prompts that begin alike go on from a row that has read what
they share.

On a mesh a batch's rows lie in groups, each with its own pages (`kv_cache.row_groups`); a request
goes to one of them, and a prefix is read in each group that has requests which begin with it.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.generation.batches import Batch, Sizes, make_batch
from jaxmoe.generation.drafts import Drafter
from jaxmoe.generation.prefixes import Prefix
from jaxmoe.generation.request import Request
from jaxmoe.generation.rows import FreePages, Row
from jaxmoe.model.adapters import adapter_number

LOOKAHEAD = 256  # requests that wait for their prefix to be read and let later requests pass


class Fork(NamedTuple):
    """A row that goes on where another has come to; both are counted over all groups.

    Attributes:
        restart: rows of the cache that are emptied first.
    """

    source: int
    target: int
    restart: np.ndarray


@dataclasses.dataclass
class Group:
    """Rows that share pages.

    Attributes:
        first: the number of its first row.
        rows: first those for requests, then those that hold prefixes.
        held: the prefixes that have been, or are being, read here, and their rows.
        coming: requests that wait for one of them.
    """

    first: int
    rows: list[Row | None]
    free: FreePages
    held: dict[Prefix, int] = dataclasses.field(default_factory=dict)
    coming: int = 0


class Scheduler:
    """Gives rows to requests and each step its tokens.

    A batch can be made before the tokens that the one before wrote are known. Who has read them
    gives them to `Row.seen`, and releases the row of an answer that has ended.

    Attributes:
        waiting: the requests that have no row yet, in their order, each with its prefix.
    """

    def __init__(
        self,
        free: Sequence[FreePages],
        rows: int,
        holders: int,
        sizes: Sizes,
        *,
        padding: int,
        after: int = 0,
        adapters: Sequence[str] = (),
        drafter: Drafter | None = None,
    ):
        """Begins with all rows free.

        Args:
            free: the free pages of each group of rows.
            rows: of a group, for requests.
            holders: rows of a group that hold prefixes.
            padding: the token that fills steps up.
            after: tokens of a document that every request comes after; the last row of each group
                has them.
            adapters: the names of those that requests choose.
            drafter: gives rows drafts.
        """
        self.waiting: collections.deque[tuple[Request, Prefix | None]] = collections.deque()
        self._groups = [
            Group(i * (rows + holders), [None] * (rows + holders), pages)
            for i, pages in enumerate(free)
        ]
        self._requests, self._after = rows, after
        self._pages = free[0].free
        self._sizes, self._padding = sizes, padding
        self._adapters, self._drafter = adapters, drafter
        self._forks: list[Fork] = []
        self._entered = 0
        for group in self._groups if after else ():
            group.rows[-1] = Row((), None, None, 0, fresh=False)

    @property
    def busy(self) -> bool:
        """Whether requests are waiting or in work."""
        return bool(self.waiting) or any(
            row and row.request for group in self._groups for row in group.rows
        )

    @property
    def prefixes(self) -> set[Prefix]:
        """The prefixes that rows hold, or that waiting requests begin with."""
        waiting = {part for _, prefix in self.waiting if prefix for part in prefix.path}
        return waiting.union(*(group.held for group in self._groups))

    def can_hold(self, request: Request) -> bool:
        """Whether a group of rows has the pages for a request when it has no other."""
        group = self._groups[0]
        pages = group.free.needed(self._after + request.length, self._after)
        return all(need <= have for need, have in zip(pages, self._pages, strict=True))

    def add(self, requests: Sequence[Request], prefixes: Sequence[Prefix | None]) -> None:
        """Lets requests wait, each with the prefix that it shares with other requests."""
        self.waiting.extend(zip(requests, prefixes, strict=True))

    def next_batch(self) -> tuple[list[Fork], Batch | None]:
        """The rows to fork, and then the next step's tokens.

        The batch is None if rows wait until their last tokens have been read.
        """
        self._admit()
        forks, self._forks = self._forks, []
        rows = [group.rows for group in self._groups]
        if self._drafter is not None:
            self._drafter.give(rows)
        batch = make_batch(rows, self._sizes, self._after, self._padding)
        for group in self._groups:
            for row in group.rows[: self._requests]:
                if row and row.complete:
                    self.release(row)
            self._drop_unused(group, only_done=True)
        return forks, batch

    def wants_tokens(self) -> bool:
        """Whether drafts are worth waiting for the tokens that have not been read."""
        drafter, rows = self._drafter, [group.rows for group in self._groups]
        return drafter is not None and drafter.wants(rows)

    def wants_guesses(self, batch: Batch) -> bool:
        """Whether guesses after a step, which is made, are likely to be worth what they cost."""
        drafter, rows = self._drafter, [group.rows for group in self._groups]
        reading = {row for row, *_ in batch.read}
        return drafter is not None and drafter.wants_source(rows, reading)

    def release(self, row: Row) -> None:
        """Frees the row of an answer that needs no more tokens, if it is not free already."""
        for group in self._groups:
            if row in group.rows[: self._requests]:
                self._leave(group, group.rows.index(row))

    # Admission

    def _admit(self) -> None:
        """Gives free rows to waiting requests, as long as there are pages for them."""
        passed = []
        for group in self._groups:
            group.coming = 0
        while self.waiting and len(passed) < LOOKAHEAD:
            request, prefix = self.waiting[0]
            row = self._join(request, prefix)
            if row is None and not self._working():
                row = self._join_alone(request, prefix)
            if row is None:
                break
            self.waiting.popleft()
            if row.request is not request:
                passed.append((request, prefix))
        self.waiting.extendleft(reversed(passed))

    def _working(self) -> bool:
        rows = [row for group in self._groups for row in group.rows if row]
        return any(row.request or row.pending for row in rows)

    def _join(self, request: Request, prefix: Prefix | None) -> Row | None:
        """The request's row, or that of a prefix which has to be read first; None without room.

        Groups with the fewest requests come first, so that all have work.
        """

        def order(group: Group):
            busy = self._requests - group.rows[: self._requests].count(None)
            return busy + group.coming, prefix not in group.held

        for group in sorted(self._groups, key=order):
            if None not in group.rows[: self._requests]:
                continue
            parent = self._longest_held(group, prefix)
            if parent and parent.pending:
                group.coming += 1
                return parent
            row = self._enter(group, request.tokens, request, parent, prefix)
            if row is not None:
                self._count_begun(prefix)
                return row
        return None

    def _join_alone(self, request: Request, prefix: Prefix | None) -> Row | None:
        """`_join` where nothing is in work: other prefixes leave, and if need be the request's own.

        Raises:
            UserError: if an empty cache has no room for the request.
        """
        for group in self._groups:
            self._drop_unused(group, but=prefix)
        row = self._join(request, prefix)
        if row is None:
            for group in self._groups:
                self._drop_unused(group)
            row = self._join(request, None)
            self._count_begun(prefix)
        if row is None:
            raise UserError(
                f"the cache has no room for request {request.id!r} of {request.length} tokens; "
                "give it more, or ask for fewer new tokens."
            )
        return row

    def _count_begun(self, prefix: Prefix | None) -> None:
        for part in prefix.path if prefix else ():
            part.waiting -= 1

    def _longest_held(self, group: Group, prefix: Prefix | None) -> Row | None:
        """`_hold` of the longest part of a prefix for which there is room."""
        parts = prefix.path if prefix else []
        rows = (self._hold(group, part) for part in (*parts, None))
        return next((row for row in rows if row is not None), None)

    def _hold(self, group: Group, prefix: Prefix | None) -> Row | None:
        """The row that holds a prefix, or will when it has read it; None without room.

        Without a prefix the row that holds the document, or None.
        """
        if prefix is None:
            return group.rows[-1] if self._after else None
        if prefix in group.held:
            return group.rows[group.held[prefix]]
        parent = self._hold(group, prefix.parent)
        if prefix.parent and (parent is None or parent.pending):
            return parent
        if None not in group.rows[self._requests :]:
            self._drop_unused(group, but=prefix)
        return self._enter(group, prefix.tokens, None, parent, prefix)

    def _enter(
        self,
        group: Group,
        tokens: tuple[int, ...],
        request: Request | None,
        parent: Row | None,
        prefix: Prefix | None,
    ) -> Row | None:
        """A row that goes on from `parent`; None without a free one or pages for all its tokens.

        Args:
            request: None for a row that holds `prefix`.
            prefix: the request's, or the one to hold.
        """
        begin, end = (0, self._requests) if request else (self._requests, len(group.rows))
        if None not in group.rows[begin:end]:
            return None
        shared = len(parent.tokens) if parent else 0
        most = self._after + (request.length if request else len(tokens))
        pages = group.free.needed(most, self._after + shared if parent else 0)
        if not group.free.reserve(pages):
            self._drop_unused(group, but=prefix)
            if not group.free.reserve(pages):
                return None
        i = group.rows.index(None, begin, end)
        waits = bool(request and request.sampling and request.sampling.grammar)
        self._entered += 1
        whose = request or prefix
        adapter = adapter_number(self._adapters, whose.adapter if whose else None)
        about = {"turn": self._entered, "waits": waits, "pages": pages, "adapter": adapter}
        row = Row(tokens, request, parent, shared, **about)
        group.rows[i] = row
        if prefix and not request:
            group.held[prefix] = i
        if parent:
            parent.users += 1
            source = group.first + group.rows.index(parent)
            self._forks.append(Fork(source, group.first + i, self._emptied()))
            row.fresh = False
        return row

    def _emptied(self) -> np.ndarray:
        rows = (row for group in self._groups for row in group.rows)
        return np.array([row is None or row.fresh for row in rows])

    # Leaving

    def _leave(self, group: Group, i: int) -> None:
        row = group.rows[i]
        assert row is not None
        group.rows[i] = None
        group.free.release(row.pages)
        if row.parent:
            row.parent.users -= 1

    def _drop_unused(
        self, group: Group, but: Prefix | None = None, only_done: bool = False
    ) -> None:
        """Frees rows that hold prefixes which no row in work goes on from.

        Args:
            but: keeps what this prefix begins with.
            only_done: keeps those that waiting requests begin with, too.
        """
        kept = but.path if but else []
        for prefix, i in sorted(group.held.items(), key=lambda item: -len(item[0].tokens)):
            row = group.rows[i]
            unused = row is not None and not row.users and not row.pending
            if unused and prefix not in kept and not (only_done and prefix.waiting):
                del group.held[prefix]
                self._leave(group, i)
