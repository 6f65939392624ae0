"""The arrays of a step: which tokens it takes of which rows, in one of a few sizes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.config import Llama4Config
from jaxmoe.generation.rows import Row
from jaxmoe.generation.sampling import NO_TOKEN
from jaxmoe.model.kv_cache.layer import FEW_QUERIES
from jaxmoe.model.packing import Packing
from jaxmoe.model.steps import Inputs
from pallas_kernels.attention.decode_config import MAX_COLUMNS

STEP_TOKENS = 512  # that a step takes, at most
MOST_PIECES = 32  # rows of a group that read in one step
SMALLEST, SIZES = 16, 3  # of steps in which prompts are read
OVERHEAD = {"cpu": 16}  # what a step costs beside its tokens, in tokens, by platform
READING_WEIGHTS = 256  # the same where a step takes as long as reading the weights

Placed = tuple[int, Row]  # a row and its place among those of its group


class Batch(NamedTuple):
    """What one step is given, in NumPy arrays; G groups of rows.

    Attributes:
        inputs: the new tokens; `PREVIOUS` for those that only the device knows yet.
        packing: the rows that they belong to.
        restart: the rows of the cache that are emptied first.
        slots: [G, Q], which tokens of each group an answer goes on after; 0 where there is none.
        targets: [G, Q], the rows that these belong to; the number of a group's rows, or more, where
            there is none.
        writers: those rows, by group and slot, and how many tokens each has written before. A row
            with drafts comes several times, one after the other.
        drafts: [G, Q], the draft at such a place: what is written there counts if this was written
            at the place before. NO_TOKEN where it counts in any case.
        read: rows that read, the place of their first token among all of the step's, its index in
            their prompt, and how many there are.
        real: how many of the tokens are no padding.
        adapter: [G, T], or [D, S] of lines: the number of each token's adapter.
    """

    inputs: Inputs
    packing: Packing
    restart: np.ndarray
    slots: np.ndarray
    targets: np.ndarray
    writers: list[tuple[int, int, Row, int]]
    drafts: np.ndarray
    read: list[tuple[Row, int, int, int]]
    real: int
    adapter: np.ndarray

    @property
    def has_drafts(self) -> bool:
        """Whether only the tokens say how far rows have come."""
        return bool((self.drafts != NO_TOKEN).any())


def overhead_of(platform: str) -> int:
    """What a step costs beside its tokens, in tokens."""
    return OVERHEAD.get(platform, READING_WEIGHTS)


def line_of(config: Llama4Config, platform: str) -> int:
    """How many tokens of a row share a line of a step with drafts.

    A GPU reads the row's keys once for all of them, and what they leave empty costs nothing beside
    reading weights. A CPU computes it.
    """
    group = config.num_attention_heads // config.num_key_value_heads
    return FEW_QUERIES if platform == "gpu" and FEW_QUERIES * group <= MAX_COLUMNS else 1


class Sizes:
    """The sizes that steps come in: few, since each is compiled.

    Attributes:
        rows: of a group.
        single: lines of a group where every row has one: 1, 4, 8, 16, ... up to all rows; beyond,
            where one row with all its drafts has more.
        drafted: tokens of a group, drafts and those before them, among which steps are chosen.
        packed: tokens of a group where some rows have more, at most the budget.
        line: tokens of a row, at most, that share a line of a step with drafts.
    """

    def __init__(self, rows: int, budget: int, overhead: int, drafts: int = 0, line: int = 1):
        """Sizes for so many rows of a group.

        Args:
            budget: tokens of a group; twice the rows, if that is more.
            overhead: what a step costs beside its tokens, in tokens.
            drafts: of a row, for which steps may have more lines than the rows need.
            line: as of `line_of`. If it is more than 1, no row has more drafts than fill a line.
        """
        powers = [1 << i for i in range(64) if i != 1]
        self.rows = rows
        self.single = [size for size in powers if size < rows] + [rows]
        few = (x for i in range(64) for x in (1 << i, 3 << i >> 1))  # 1, 2, 3, 4, 6, 8, 12, ...
        self.drafted = [x for x in few if x <= rows * line]
        if line == 1:
            self.single += [size for size in powers if rows < size < 2 * (1 + drafts)]
            self.drafted = self.single
        budget = max(budget, 2 * rows)
        packed = [budget // 4**i for i in range(SIZES)]
        self.packed = [x for x in packed if x >= min(SMALLEST, budget)]
        self.overhead, self.line = overhead, line

    def choose(self, single: int, wanted: Sequence[int], packed: bool) -> int:
        """The size of a step with the least cost for each of its tokens.

        Args:
            single: lines of each group that have to be in the step, at most.
            wanted: tokens of each group that may be.
            packed: whether a row has several of them.
        """
        if not packed:
            return next(size for size in self.single if size >= single)

        def cost(size: int) -> float:
            return self.cost(size, len(wanted)) / sum(min(size, tokens) for tokens in wanted)

        return min((size for size in self.packed if size > single), key=cost)

    def cost(self, size: int, groups: int) -> int:
        """What a step costs, in tokens."""
        return self.overhead + size * groups


def sizes_for(config: Llama4Config, platform: str, rows: int, budget: int, drafts: int) -> Sizes:
    """The sizes of steps on a platform; other arguments as for `Sizes`."""
    return Sizes(rows, budget, overhead_of(platform), drafts, line_of(config, platform))


def share_out(pending: Sequence[int], left: int) -> list[int]:
    """How many tokens each of some rows gets: evenly, but none more than are pending."""
    shares = [0] * len(pending)
    order = sorted(range(len(pending)), key=lambda i: pending[i])
    for done, i in enumerate(order):
        shares[i] = min(pending[i], left // (len(order) - done))
        left -= shares[i]
    return shares


def make_batch(
    groups: Sequence[Sequence[Row | None]], sizes: Sizes, after: int, padding: int
) -> Batch | None:
    """The next tokens of all rows, which then count as fed; None if no row has any.

    Args:
        groups: the rows of each group, those that hold prefixes last.
        after: the position of each row's first token.
        padding: the token that fills steps up.
    """
    placed = [[(i, row) for i, row in enumerate(g) if row and row.pending] for g in groups]
    single = [[x for x in rows if x[1].pending == 1][: sizes.rows] for rows in placed]
    pieces = [sorted((x for x in rows if x[1].pending > 1), key=_urgency) for rows in placed]
    pieces = [rows[:MOST_PIECES] for rows in pieces]
    if not any(placed):
        return None
    line = sizes.line if any(row.drafts for rows in single for _, row in rows) else 1
    most = max(sum(-(-(1 + len(row.drafts)) // line) for _, row in rows) for rows in single)
    wanted = [len(s) + sum(r.pending for _, r in p) for s, p in zip(single, pieces, strict=True)]
    width = line * sizes.choose(most, wanted, any(pieces))
    restart = np.array([row is None or row.fresh for rows in groups for row in rows])
    writing = min(width, sizes.rows) if any(pieces) else width
    build = _Builder(len(groups), len(groups[0]), width, writing, padding, line)
    for g, (ones, more) in enumerate(zip(single, pieces, strict=True)):
        for i, row in ones:
            build.put(g, i, row, 1, after, 0)
        shares = share_out([row.pending for _, row in more], width - len(ones))
        kept = [(i, row, share) for (i, row), share in zip(more, shares, strict=True) if share]
        for number, (i, row, share) in enumerate(kept):
            build.put(g, i, row, share, after, number + 1)
    return build.batch(restart, any(pieces))


def _urgency(placed: Placed) -> tuple[bool, int]:
    """Prefixes come first, since requests wait for them; then the rows that have waited longest."""
    row = placed[1]
    return row.request is not None, row.turn


class _Builder:
    """Fills the arrays of a batch, row by row."""

    def __init__(self, groups: int, rows: int, width: int, most: int, padding: int, line: int):
        self.line, self.real = line, 0
        self.tokens = np.full((groups, width), padding, np.int32)
        self.positions, self.segments, self.row, self.adapter = np.zeros(
            (4, groups, width), np.int32
        )
        self.single = np.zeros((groups, width), bool)
        self.pieces = np.full((groups, min(MOST_PIECES, rows)), -1, np.int32)
        self.slots, self.targets = np.zeros((2, groups, most), np.int32)
        self.targets += rows
        self.drafts = np.full(self.slots.shape, NO_TOKEN, np.int32)
        self.used, self.written = [0] * groups, [0] * groups
        self.writers: list[tuple[int, int, Row, int]] = []
        self.read: list[tuple[Row, int, int, int]] = []

    def put(self, group: int, i: int, row: Row, count: int, after: int, piece: int) -> None:
        """Adds the next tokens of a row; `piece` is 0 for a single one, which drafts may follow."""
        start = self.used[group]
        prompt = row.tokens[row.fed : row.fed + count]
        tokens = prompt or (row.newest, *row.drafts)
        here = group, slice(start, start + len(tokens))
        self.tokens[here] = tokens
        self.positions[here] = after + row.fed + np.arange(len(tokens))
        self.segments[here], self.row[here], self.single[here] = piece or 1, i, not piece
        self.adapter[here] = row.adapter
        if piece:
            self.pieces[group, piece - 1] = i
        self.used[group] += -(-len(tokens) // self.line) * self.line
        self.real += len(tokens)
        if prompt:
            self.read.append((row, group * self.tokens.shape[1] + start, row.fed, count))
        if not row.feed(count):
            return
        for place, draft in enumerate((NO_TOKEN, *row.drafts)):
            slot = self.written[group]
            self.slots[group, slot], self.targets[group, slot] = start + count - 1 + place, i
            self.drafts[group, slot] = draft
            self.writers.append((group, slot, row, row.written - 1 + place))
            self.written[group] += 1

    def batch(self, restart: np.ndarray, packed: bool) -> Batch:
        """The batch; `packed` if a row has several tokens."""
        arrays: Any = (self.tokens, self.positions, self.segments)
        where: Any = (self.row, self.single, self.pieces)
        if not packed:
            lines = [x.reshape(-1, self.line) for x in (*arrays, self.row, self.adapter)]
            arrays, where, self.adapter = lines[:3], lines[3:4], lines[4]
        rest = self.slots, self.targets, self.writers, self.drafts, self.read, self.real
        rest += (self.adapter,)
        return Batch(Inputs(*arrays), Packing(*where), restart, *rest)
