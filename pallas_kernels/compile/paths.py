"""Finds the loops of a TPU program's bundles, and the cheapest and longest paths through them."""

import dataclasses
import functools
import operator
from collections.abc import Iterable
from typing import NamedTuple

from pallas_kernels.compile.bundles import Code, Work


class Needs(NamedTuple):
    """What a path must do to be considered.

    Attributes:
        copied: bytes of copies from memory that it starts, and bytes of copies that it waits for.
        through: a node that it visits; None for any.
    """

    copied: float | int = 0
    through: int | None = None

    def met(self, path: "Path") -> tuple[float | int, ...]:
        """How much of what is needed a path starts, waits for and visits; a visit counts most."""
        started, waited = (min(x, self.copied) for x in (path.work.started, path.work.waited))
        return started, waited, (2 * self.copied + 1) * int(self.through in path.nodes)


@dataclasses.dataclass(frozen=True)
class Path:
    """A path through a loop from its header until it is back there, or through a whole code.

    Attributes:
        nodes: its blocks, and the headers of the inner loops that it runs.
        work: what it does; inner loops count as often as they run, with their longest path.
    """

    nodes: tuple[int, ...]
    work: Work


def whole(code: Code) -> "Loop":
    """A code from its entry to its end, as a loop that runs once."""
    found: list[Loop] = []
    for header, body in sorted(code.flow.loops.items(), key=lambda loop: len(loop[1])):
        inside = tuple(loop for loop in found if loop.header in body)
        found = [loop for loop in found if loop not in inside]
        found.append(Loop(code, header, frozenset(body), inside, code.trips(header)))
    return Loop(code, 0, frozenset(code.flow.order), tuple(found), 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """A loop of a code, or a whole code.

    Attributes:
        code: the code.
        header: the block where an iteration begins.
        body: all its blocks, those of inner loops included.
        inner: the loops in it that are in no other loop in it.
        trips: how often it runs when it is entered, if that is constant.
    """

    code: Code
    header: int
    body: frozenset[int]
    inner: tuple["Loop", ...]
    trips: int | None

    @property
    def all_inner(self) -> Iterable["Loop"]:
        """The loops in it, outer ones before those in them."""
        for loop in self.inner:
            yield loop
            yield from loop.all_inner

    @property
    def total(self) -> Work:
        """The work of all blocks, each counted once."""
        return functools.reduce(operator.add, (self.code.works[block] for block in self.body))

    @functools.cached_property
    def works(self) -> dict[int, Work]:
        """The work of each node of its paths: blocks, and by their headers the inner loops."""
        inside = {block for loop in self.inner for block in loop.body}
        works = {block: self.code.works[block] for block in self.body - inside}
        return works | {loop.header: loop.run for loop in self.inner}

    @functools.cached_property
    def run(self) -> Work:
        """The work of all iterations, each by the longest path; one if their number is unknown."""
        once = self.longest.work
        if self.trips is None:
            return dataclasses.replace(once, loops=once.loops + 1)
        return once.times(self.trips)

    @functools.cached_property
    def longest(self) -> Path:
        """The path with the most bundles."""
        return self._longest(self._order)

    @property
    def longest_idle(self) -> Path:
        """The path with the most bundles among those that multiply no matrices.

        Raises:
            KeyError: if all paths do.
        """
        return self._longest([node for node in self._order if not self.works[node].products])

    def _longest(self, nodes: list[int]) -> Path:
        best: dict[int, Path] = {}
        for node in reversed(nodes):
            behind = [best[x] for x in self._followers[node] if x in best]
            ends = self.header in self._followers[node] or not self._followers[node]
            if behind or ends:
                after = max(behind, key=lambda path: path.work.bundles, default=Path((), Work()))
                best[node] = Path((node, *after.nodes), self.works[node] + after.work)
        return best[self.header]

    def entries(self, inner: "Loop") -> int:
        """How often a loop in it is entered while it is entered once; unknown trips count as one.

        Args:
            inner: one of `all_inner`, or of another call of `whole` with the same code.
        """
        trips = self.trips or 1
        around = [loop for loop in self.inner if inner.header in loop.body]
        if not around or around[0].header == inner.header:
            return trips
        return trips * around[0].entries(inner)

    def cheapest(self, needs: Needs) -> Path:
        """The path with the fewest bundles among those that do most of what is needed."""
        paths: dict[int, list[Path]] = {}
        for node in reversed(self._order):
            behind = [path for x in self._followers[node] for path in paths.get(x, ())]
            if self.header in self._followers[node] or not self._followers[node]:
                behind.append(Path((), Work()))
            found = [Path((node, *x.nodes), self.works[node] + x.work) for x in behind]
            paths[node] = _undominated(found, needs)
        return max(paths[self.header], key=lambda path: (sum(needs.met(path)), -path.work.bundles))

    @functools.cached_property
    def _node(self) -> dict[int, int]:
        """For each block of the body the node that it belongs to."""
        inner = {block: loop.header for loop in self.inner for block in loop.body}
        return {block: inner.get(block, block) for block in self.body}

    @functools.cached_property
    def _order(self) -> list[int]:
        return [x for x in self.code.flow.order if x in self.works]

    @functools.cached_property
    def _followers(self) -> dict[int, set[int]]:
        """For each node those that may follow it, the header among them behind an iteration."""
        followers: dict[int, set[int]] = {node: set() for node in self.works}
        for block, node in self._node.items():
            for x in self.code.flow.successors[block]:
                to = self._node.get(x)
                if to is not None and (to != node or to == self.header):
                    followers[node].add(to)
        return followers


def _undominated(paths: list[Path], needs: Needs) -> list[Path]:
    """The paths such that none has fewer bundles and does as much of what is needed."""
    kept: dict[tuple[float | int, ...], Path] = {}
    for path in sorted(paths, key=lambda path: path.work.bundles):
        met = needs.met(path)
        if not any(all(x >= y for x, y in zip(other, met, strict=True)) for other in kept):
            kept[met] = path
    return list(kept.values())
