"""Control flow graphs of machine code: orders and loops, whatever the instructions are."""

import collections
import functools
from collections.abc import Sequence


class Flow:
    """A control flow graph whose nodes are numbered from 0, where it is entered.

    Args:
        successors: for each node the nodes that may follow it.
    """

    def __init__(self, successors: Sequence[tuple[int, ...]]):
        self.successors = successors

    @functools.cached_property
    def order(self) -> list[int]:
        """The reachable nodes in reverse postorder: a node comes before those it dominates."""
        order: list[int] = []
        seen, waiting = {0}, [(0, iter(self.successors[0]))]
        while waiting:
            node, followers = waiting[-1]
            for follower in followers:
                if follower not in seen:
                    seen.add(follower)
                    waiting.append((follower, iter(self.successors[follower])))
                    break
            else:
                order.append(node)
                waiting.pop()
        return order[::-1]

    @functools.cached_property
    def loops(self) -> dict[int, set[int]]:
        """The natural loops: for each loop header, the set of nodes of its loop."""
        bodies: dict[int, set[int]] = {}
        for node in self.order:
            for header in self.successors[node]:
                if self._dominates(header, node):
                    bodies.setdefault(header, {header}).update(self._leading_to(node, header))
        return bodies

    @functools.cached_property
    def _predecessors(self) -> dict[int, list[int]]:
        predecessors = collections.defaultdict(list)
        for node in self.order:
            for follower in self.successors[node]:
                predecessors[follower].append(node)
        return predecessors

    @functools.cached_property
    def _dominator(self) -> dict[int, int]:
        """The immediate dominator of each node.

        The algorithm is that of Cooper, Harvey and Kennedy, "A simple, fast dominance algorithm".
        """
        rank = {node: position for position, node in enumerate(self.order)}
        dominator = {0: 0}

        def common(a: int, b: int) -> int:
            while a != b:
                a, b = (dominator[a], b) if rank[a] > rank[b] else (a, dominator[b])
            return a

        changed = True
        while changed:
            changed = False
            for node in self.order[1:]:
                known = [x for x in self._predecessors[node] if x in dominator]
                nearest = functools.reduce(common, known)
                changed |= dominator.get(node) != nearest
                dominator[node] = nearest
        return dominator

    def _dominates(self, header: int, node: int) -> bool:
        while node > 0 and node != header:
            node = self._dominator[node]
        return node == header

    def _leading_to(self, last: int, header: int) -> set[int]:
        body, waiting = {header}, [last]
        while waiting:
            node = waiting.pop()
            if node not in body:
                body.add(node)
                waiting += self._predecessors[node]
        return body
