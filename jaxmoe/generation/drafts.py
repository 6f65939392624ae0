"""Drafts: tokens that are likely to come, of which a step checks several at once.

A row's text often repeats its prompt or itself: what followed the last few tokens when they came
before is a draft of what follows now (`jaxmoe.generation.lookup`). Or a head guesses
(`jaxmoe.generation.head_drafts`). A step takes a row's last token and its drafts side by side,
each as a single token of the row or all in one line (`line_of`), and chooses a token after each of
them with the random numbers of that place in the answer. While the chosen token is the draft that
comes next, the choice after that one counts too. So the answer is the one without drafts, token for
token; in bfloat16 but for the rounding of steps of another size.

A refused draft leaves its keys in the cache. They are never seen: every later query either comes
before their position, or in a step that has written the position anew. In the ring of a chunked
layer a draft overwrites a token of an earlier chunk, which no token of its own chunk sees: drafts
end with the chunk.

How many are worth while follows from how often earlier ones were right, which each token of an
answer shows, drafted or not, and from what a step costs by its size. They only fill what the
batch's rows leave empty: of single tokens there are none with all rows in work, of lines what is
left of each.
"""

import collections
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation.batches import Sizes, line_of
from jaxmoe.generation.lookup import Lookup
from jaxmoe.generation.rows import Row
from jaxmoe.model.kv_cache import cache_kinds
from jaxmoe.model.kv_cache.ring import RingCache

DRAFTS = {"cpu": 7}  # of a row in a step at most, by platform; elsewhere there is no measurement
GUESSES = 3  # of a row's head, anywhere
PLACES = 8192  # tokens of a row that a head remembers, at most; heads are trained with fewer
OVERHEAD = 3  # what a step costs beside its single tokens, each of which reads experts of its own
WORTH = 1.1  # times more tokens for the cost of a step, for which its tokens are waited for


class Offer(NamedTuple):
    """One more draft of a row, and how likely it counts."""

    chance: float
    row: Row


@runtime_checkable
class Source(Protocol):
    """What drafts are made of.

    Attributes:
        cost: what it costs on the devices, as a share of a step of single tokens.
    """

    cost: float

    def drafts(self, row: Row, count: int) -> tuple[int, ...]:
        """Up to `count` tokens that are likely to follow the row's last known one."""
        ...

    def expected(self, row: Row, count: int) -> int:
        """How many of up to `count` there are likely to be once all tokens are known."""
        ...

    def chances(self, row: Row) -> Sequence[float]:
        """How likely it is, for each number of drafts from 1 on, that all are right."""
        ...

    def rest(self) -> None:
        """Counts a step for which the source was not asked."""
        ...


class PromptLookup:
    """Drafts that followed the same tokens before."""

    cost = 0.0

    def __init__(self, most: int):
        """Drafts for rows, `most` of a row at most."""
        self._most = most

    def drafts(self, row: Row, count: int) -> tuple[int, ...]:
        """What followed the row's last tokens when they came before."""
        lookup = _lookup_of(row)
        return lookup.drafts(count) if lookup.found else ()

    def expected(self, row: Row, count: int) -> int:
        """As many as there are now."""
        return len(self.drafts(row, count))

    def chances(self, row: Row) -> Sequence[float]:
        """How likely it is, for each number of drafts from 1 on, that all are right."""
        right = _lookup_of(row).right
        return [right ** (n + 1) for n in range(self._most)]

    def rest(self) -> None:
        """Changes nothing."""


class Drafter:
    """Gives rows the drafts that are worth while in the next step."""

    def __init__(
        self,
        config: Llama4Config,
        most: int,
        sizes: Sizes,
        after: int,
        allowed: Callable[[Row, Sequence[int]], int],
        source: Source,
    ):
        """Drafts for the rows of an engine.

        Args:
            most: drafts of a row in a step, at most.
            sizes: of steps.
            after: the position of each row's first token.
            allowed: how many of a row's drafts its grammar takes, from the first on.
            source: of the drafts.
        """
        self._source = source
        self._most, self._sizes, self._after, self._allowed = most, sizes.drafted, after, allowed
        self._vocab_size = config.vocab_size
        self._given: collections.Counter[Row] = collections.Counter()
        self._none = False
        self._spans = [kind.span for kind in cache_kinds(config) if isinstance(kind, RingCache)]

    def wants(self, groups: Sequence[Sequence[Row | None]]) -> bool:
        """Whether there are likely to be drafts once the tokens of earlier steps are read.

        If not, the next `give` need not look again.
        """
        self._none = not self._worth(groups, unread=True)
        return not self._none

    def give(self, groups: Sequence[Sequence[Row | None]]) -> None:
        """Sets `Row.drafts` for the next step."""
        for row in self._given:
            row.drafts = ()
        self._given, none, self._none = collections.Counter(), self._none, False
        if none:
            return
        self._given.update(offer.row for offer in self._worth(groups, unread=False))
        for row, count in self._given.items():
            drafts = self._drafts(row)[:count]
            row.drafts = drafts[: self._allowed(row, drafts)]

    def _worth(self, groups: Sequence[Sequence[Row | None]], unread: bool) -> list[Offer]:
        """The offers that a step takes, of those that make it the cheapest for its tokens.

        Args:
            unread: whether tokens may be on their way that drafts would follow.
        """
        rows = _single(groups)
        if not any(rows):
            return []
        return self._taken(
            [len(of_group) for of_group in rows],
            lambda: [self._offers(of_group, unread) for of_group in rows],
        )

    def _taken(
        self, used: Sequence[int], offers_of: Callable[[], list[list[Offer]]]
    ) -> list[Offer]:
        """The offers of groups that a step takes, beside so many tokens of each.

        Args:
            offers_of: what each group has, the likeliest first; asked only if a step has room.
        """
        costs = {x: OVERHEAD + x * len(used) for x in self._sizes if x >= max(used)}
        least = next(iter(costs.values()), 1)
        best, taken = WORTH * sum(used) / least, []

        def most(size: int) -> int:
            return sum(min(size, count * (1 + self._most)) for count in used)

        costs = {size: cost + self._source.cost * least for size, cost in costs.items()}
        sizes = [size for size, cost in costs.items() if most(size) / cost > best]
        offers = offers_of() if sizes else []
        for size in sizes if any(offers) else ():
            pairs = zip(offers, used, strict=True)
            found = [offer for own, count in pairs for offer in own[: size - count]]
            tokens = sum(used) + sum(offer.chance for offer in found)
            if tokens / costs[size] > best:
                best, taken = tokens / costs[size], found
        return taken

    def wants_source(self, groups: Sequence[Sequence[Row | None]], reading: set[Row]) -> bool:
        """Whether drafts are likely to be worth while once all rows in work write.

        Args:
            reading: rows that the step feeds prompts or prefixes.
        """
        rows = [[x for x in of_group if x and (x.request or x in reading)] for of_group in groups]
        wanted = bool(any(rows)) and bool(
            self._taken(
                [len(of_group) for of_group in rows],
                lambda: [self._chances(of_group, lambda row: self._most) for of_group in rows],
            )
        )
        if not wanted:
            self._source.rest()
        return wanted

    def _offers(self, rows: Sequence[Row], unread: bool) -> list[Offer]:
        """The drafts that rows of a group may have, the likeliest first."""

        def count(row: Row) -> int:
            if unread:
                return self._source.expected(row, self._room(row))
            return len(self._drafts(row))

        return self._chances([row for row in rows if _may_draft(row, unread)], count)

    def _chances(self, rows: Sequence[Row], count: Callable[[Row], int]) -> list[Offer]:
        """Offers of so many drafts of each row, the likeliest first."""
        found = [Offer(x, row) for row in rows for x in self._source.chances(row)[: count(row)]]
        return sorted(found, key=lambda offer: -offer.chance)

    def _room(self, row: Row) -> int:
        """How many drafts the row has room for."""
        if row.request is None:
            return 0
        position = self._after + row.fed
        room = [self._most, row.request.max_new_tokens - row.written - 1]
        room += [span - 1 - position % span for span in self._spans]
        return max(0, min(room))

    def _drafts(self, row: Row) -> tuple[int, ...]:
        """What is likely to follow, as far as the row has room for it."""
        drafts = self._source.drafts(row, self._room(row))
        known = [token < self._vocab_size for token in drafts]  # others stand for pictures
        return drafts[: known.index(False) if False in known else len(known)]


def _single(groups: Sequence[Sequence[Row | None]]) -> list[list[Row]]:
    """The rows that have a token for the next step; none if any has several."""
    found: list[list[Row]] = [[] for _ in groups]
    for of_group, single in zip(groups, found, strict=True):
        for row in of_group:
            pending = row.pending if row else 0
            if row and pending == 1:
                single.append(row)
            elif pending:
                return []
    return found


def _lookup_of(row: Row) -> Lookup:
    """The row's own, with all tokens that are known."""
    if row.lookup is None:
        row.lookup = Lookup(row.tokens)
    row.lookup.take(row.answer)
    return row.lookup


def _may_draft(row: Row, unread: bool) -> bool:
    """Whether a row writes, and its tokens are known."""
    if row.request is None or row.fed < len(row.tokens) or not row.answer:
        return False
    return unread or row.known == row.written


def places_of_row(tokens: int, step_tokens: int, count: int) -> int:
    """How many tokens of a row a head's cache has room for.

    Args:
        tokens: of a row, at most.
        step_tokens: of a row in one step, at most.
        count: tokens to guess.
    """
    return max(step_tokens + 2 * count + 2, min(tokens + count, PLACES))


def most_drafts(config: Llama4Config, platform: str) -> int | None:
    """How many drafts a row has at most; None for any number.

    0 on TPUs, whose kernels write one token to a page in a step, and with sliding windows, of which
    a draft would overwrite a token that is still seen. On GPUs no more than fill a line.
    """
    rings = (kind.mask for kind in cache_kinds(config) if isinstance(kind, RingCache))
    if platform == "tpu" or not all(mask.block_diagonal for mask in rings):
        return 0
    line = line_of(config, platform)
    return None if line == 1 else line - 1


def drafts_for(
    config: Llama4Config, platform: str, wanted: int | None, has_head: bool = False
) -> int:
    """How many drafts a row has, of those wanted, or by default; warns if they are fewer.

    Raises:
        UserError: for fewer than none, or if there is a head, which cannot draft there.
    """
    if wanted is not None and wanted < 0:
        raise UserError(f"drafts {wanted} is below 0.")
    most = most_drafts(config, platform)
    if has_head and most == 0:
        raise UserError(f"this model has no drafts on {platform}; leave the head out.")
    default = GUESSES if has_head else DRAFTS.get(platform, 0)
    count = default if wanted is None else wanted
    if most is None or count <= most:
        return count
    if wanted is not None:
        limit = f"drafts {wanted}: a row of this model has at most {most} on {platform}"
        warnings.warn(limit, stacklevel=2)
    return most
