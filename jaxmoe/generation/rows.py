"""A row of the batch while it serves a request, and the pages that rows take."""

import dataclasses

from jaxmoe.generation.lookup import Lookup
from jaxmoe.generation.request import Request
from jaxmoe.model.kv_cache import CacheKind
from jaxmoe.model.steps import PREVIOUS


@dataclasses.dataclass(eq=False)
class Row:
    """A row while it reads a prompt and writes the answer, or reads and then holds a prefix.

    Attributes:
        tokens: the prompt or the prefix.
        request: None for a prefix.
        parent: the row that this one goes on from; None if it begins with an empty cache.
        fed: tokens of the prompt and the answer that the model has been given.
        written: tokens of the answer that the model has been asked for.
        answer: those of them that the host has seen.
        drafts: tokens that are likely to follow, for the next step.
        lookup: what drafts are made of; None if the row has had no turn for any.
        guesses: a head's, of the tokens after those that the host has seen.
        head_places: tokens that the head's sequence of the row has.
        head_linked: whether the head has the target's hidden states of the last token fed.
        turn: how many rows were begun before.
        waits: whether each token of the answer has to be seen before the next is asked for.
        fresh: whether the cache still has to be emptied for it.
        users: rows that go on from this one.
        pages: that it has reserved, by kind of cache.
        adapter: the number of the adapter that its tokens go through; 0 for none.
    """

    tokens: tuple[int, ...]
    request: Request | None
    parent: "Row | None"
    fed: int
    written: int = 0
    turn: int = 0
    waits: bool = False
    fresh: bool = True
    users: int = 0
    pages: tuple[int, ...] = ()
    adapter: int = 0
    answer: list[int] = dataclasses.field(default_factory=list)
    drafts: tuple[int, ...] = ()
    lookup: Lookup | None = None
    guesses: tuple[int, ...] = ()
    head_places: int = 0
    head_linked: bool = False

    def __post_init__(self):
        if self.parent is not None:
            self.head_places = self.parent.head_places
            self.head_linked = self.parent.head_linked

    @property
    def known(self) -> int:
        """How many tokens of the answer the host has seen."""
        return len(self.answer)

    @property
    def newest(self) -> int:
        """The answer's last token; `PREVIOUS` while only the device knows it."""
        return self.answer[-1] if self.answer and self.known == self.written else PREVIOUS

    @property
    def pending(self) -> int:
        """How many tokens the model can be given now."""
        if self.fed < len(self.tokens):
            return len(self.tokens) - self.fed
        if self.request is None or self.complete:
            return 0
        return int(not self.waits or self.known == self.written)

    @property
    def complete(self) -> bool:
        """Whether the model has been asked for all tokens of the answer."""
        return self.request is not None and self.written == self.request.max_new_tokens

    def feed(self, count: int) -> bool:
        """Counts tokens as fed; returns whether the model writes one after them.

        Drafts count when the tokens that they stand for are `seen`.
        """
        self.fed, self.fresh = self.fed + count, False
        writes = self.request is not None and self.fed >= len(self.tokens)
        self.written += writes
        return writes

    def seen(self, token: int, index: int) -> None:
        """Takes the answer's token of an index that the model has written, maybe after a draft."""
        after_draft = int(index == self.written)
        self.fed, self.written = self.fed + after_draft, self.written + after_draft
        self.answer.append(token)


class FreePages:
    """How many pages of each kind of cache are free, in a group of rows that share them."""

    def __init__(self, kinds: tuple[CacheKind, ...], pages: tuple[int, ...], shards: int):
        """All pages are free.

        Args:
            pages: of each kind, on each device.
            shards: devices that share a row.
        """
        self.kinds, self.free, self.shards = kinds, pages, shards

    def needed(self, tokens: int, shared: int) -> tuple[int, ...]:
        """Pages that a row takes, by kind.

        Args:
            tokens: that the row holds in the end.
            shared: of these, the first, which it shares with another row.
        """

        def pages(kind: CacheKind) -> int:
            whole = shared // (kind.page * self.shards) if kind.shares else 0
            return kind.pages_for(tokens, self.shards) - whole

        return tuple(map(pages, self.kinds))

    def reserve(self, pages: tuple[int, ...]) -> bool:
        """Takes pages, if there are enough of each kind."""
        left = tuple(free - taken for free, taken in zip(self.free, pages, strict=True))
        enough = min(left) >= 0
        self.free = left if enough else self.free
        return enough

    def release(self, pages: tuple[int, ...]) -> None:
        """Gives pages back."""
        self.free = tuple(free + taken for free, taken in zip(self.free, pages, strict=True))
