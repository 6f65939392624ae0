"""Packs documents into rows, and says which rows a step sees.

Everything here follows from lengths, a seed and a step, so it is the same on any number of hosts.
"""

import bisect
import collections
import dataclasses

import numpy as np
from jaxtyping import Bool, Int64, Integer

from jaxmoe.errors import UserError

BLOCK = 2**16  # rows, in each block of which every source has the same number


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Documents, or parts of them: from `start` up to `stop` of the document's tokens."""

    document: Int64[np.ndarray, "pieces"]
    start: Int64[np.ndarray, "pieces"]
    stop: Int64[np.ndarray, "pieces"]

    def __getitem__(self, index: np.ndarray | slice) -> "Pieces":
        return Pieces(self.document[index], self.start[index], self.stop[index])

    def __len__(self) -> int:
        return len(self.document)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows: row i has the pieces from `offsets[i]` up to `offsets[i + 1]`."""

    pieces: Pieces
    offsets: Int64[np.ndarray, "rows_1"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Pieces:
        return self.pieces[slice(*self.offsets[row : row + 2])]


def cut(
    lengths: Integer[np.ndarray, "documents"],
    length: int,
    too_long: str,
    divisible: Bool[np.ndarray, "documents"],
) -> Pieces:
    """The documents as pieces of at most `length` tokens.

    Args:
        lengths: tokens of each document.
        length: tokens of a row.
        too_long: what becomes of a longer document: `truncate` keeps its first piece, `split` all
            pieces, and `drop` none.
        divisible: documents that may be cut; others are dropped.
    """
    count = -(-lengths.astype(np.int64) // length)
    is_long = count > 1
    count[is_long & ~divisible] = 0
    if too_long != "split":
        count[is_long] = np.minimum(count[is_long], 1 if too_long == "truncate" else 0)
    document = np.repeat(np.arange(len(lengths)), count)
    number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    start = number * length
    return Pieces(document, start, np.minimum(start + length, lengths[document]))


def pack_rows(
    pieces: Pieces, sizes: Int64[np.ndarray, "pieces"], length: int, seed: tuple[int, ...]
) -> Rows:
    """Packs pieces into rows by `best_fit`; `seed` decides between pieces of the same size.

    Args:
        sizes: room that each piece takes of the `length` of a row.
    """
    shuffled = np.random.default_rng(seed).permutation(len(pieces))
    row = best_fit(sizes[shuffled], length)
    order = np.argsort(row, kind="stable")
    counts = np.bincount(row)
    return Rows(pieces[shuffled[order]], np.concatenate([[0], np.cumsum(counts)]))


def best_fit(sizes: Int64[np.ndarray, "pieces"], capacity: int) -> Int64[np.ndarray, "pieces"]:
    """The row of each piece by best-fit decreasing.

    The largest piece is placed first, each in the fullest row that has room for it. Pieces of one
    size are placed together, and so are rows with the same room: a row is filled with as many of
    them as it has room for, which at least halves its room, so that n pieces of d sizes take
    O(n log n + d log(capacity)) operations of NumPy and Python together.

    Args:
        sizes: from 1 to `capacity`.
    """
    row_of = np.empty(len(sizes), np.int64)
    free = _Free()
    order = np.argsort(-sizes, kind="stable")
    ends = np.flatnonzero(np.diff(sizes[order])) + 1
    for left in np.split(order, ends) if len(order) else ():
        size = int(sizes[left[0]])
        while len(left):
            room = free.least(size) or capacity
            each = room // size
            rows = free.take(room, -(-len(left) // each), is_new=room == capacity)
            placed, left = np.split(left, [each * len(rows)])
            row_of[placed] = np.repeat(rows, each)[: len(placed)]
            full, rest = divmod(len(placed), each)
            free.put(room - each * size, rows[:full])
            free.put(room - rest * size, rows[full:])
    return row_of


class _Free:
    """Rows by the room that they have; no row is empty."""

    def __init__(self):
        self._rooms: list[int] = []  # sorted
        self._rows: dict[int, list[np.ndarray]] = collections.defaultdict(list)
        self._count = 0

    def least(self, size: int) -> int | None:
        """The least room that is at least `size`; None if no row has it."""
        place = bisect.bisect_left(self._rooms, size)
        return self._rooms[place] if place < len(self._rooms) else None

    def put(self, room: int, rows: np.ndarray) -> None:
        """Keeps rows that have some room."""
        if not room or not len(rows):
            return
        if not self._rows[room]:
            bisect.insort(self._rooms, room)
        self._rows[room].append(rows)

    def take(self, room: int, wanted: int, *, is_new: bool) -> np.ndarray:
        """At most `wanted` rows with that room; as many new ones, if they are to be new."""
        if is_new:
            self._count += wanted
            return np.arange(self._count - wanted, self._count)
        parts = []
        while wanted and self._rows[room]:
            part, rest = np.split(self._rows[room].pop(), [wanted])
            parts.append(part)
            wanted -= len(part)
            if len(rest):
                self._rows[room].append(rest)
        if not self._rows[room]:
            self._rooms.pop(bisect.bisect_left(self._rooms, room))
        return np.concatenate(parts)


class Order:
    """Which row of which source is at each place of a run: a function of the seed and the place.

    Every epoch of a source has each of its rows once, in another order. In every block of `BLOCK`
    places, the sources have their shares.
    """

    def __init__(self, counts: list[int], weights: list[float], seed: int):
        """Computes the shares.

        Args:
            counts: rows of each source.
            weights: of the sources; only their ratios matter.
            seed: of the orders.

        Raises:
            UserError: if a share is less than one row of `BLOCK`.
        """
        self._counts, self._seed = counts, seed
        edges = np.rint(np.cumsum(weights) / np.sum(weights) * BLOCK).astype(np.int64)
        self._edges, self._shares = edges, np.diff(edges, prepend=0)
        if not self._shares.all():
            raise UserError(f"a source's weight is less than 1/{BLOCK} of all; leave it out.")
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def at(self, place: int) -> tuple[int, int]:
        """The source and its row at a place, counted from 0."""
        source, turn = self._turn(place) if len(self._counts) > 1 else (0, place)
        epoch, index = divmod(turn, self._counts[source])
        if self._orders.get(source, (-1,))[0] != epoch:
            rng = np.random.default_rng((self._seed, 1, source, epoch))
            self._orders[source] = epoch, rng.permutation(self._counts[source])
        return source, int(self._orders[source][1][index])

    def _turn(self, place: int) -> tuple[int, int]:
        """The source at a place, and at how many places before it that source is."""
        number, index = divmod(place, BLOCK)
        if self._block is None or self._block[0] != number:
            drawn = np.random.default_rng((self._seed, 2, number)).permutation(BLOCK)
            sources = np.searchsorted(self._edges, drawn, side="right")
            before = np.empty(BLOCK, np.int64)
            before[np.argsort(sources, kind="stable")] = np.concatenate(
                [np.arange(share) for share in self._shares]
            )
            self._block = number, sources, before
        _, sources, before = self._block
        source = int(sources[index])
        return source, number * int(self._shares[source]) + int(before[index])
