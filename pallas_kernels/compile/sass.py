"""NVIDIA's machine code as nvdisasm prints it: instructions, and the turns of its loops.

A turn is what one warp issues from the first instruction of a loop until it is back there: the
longest way on which no barrier has to be asked twice. Static: read from the code, not measured.
"""

import collections
import dataclasses
import functools
import re

_LINE = re.compile(
    r"^\s*(?P<waits>\S+?):(?P<read>\S):(?P<write>\S):(?P<yields>\S):(?P<stall>\d\d)\s+"
    r"/\*(?P<address>[0-9a-f]+)\*/\s+(?:@(?P<predicate>!?\w+)\s+)?(?P<opcode>[A-Z][\w.]*)"
    r"(?P<operands>[^;/]*)"
)
_LABEL = re.compile(r"^(\.\w+):$")
_TARGET = re.compile(r"`\((\.\w+)\)")
_ENDS = ("EXIT", "RET", "KILL", "BPT", "BRX", "JMX")  # no branch to a known place follows
_ASKS = ("SYNCS.PHASECHK", "USETMAXREG")  # for a barrier's phase, or for registers
_SHORT = 12  # instructions of a loop that does nothing else


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a warp.

    Attributes:
        address: in bytes from the kernel's first.
        predicate: such as "P0" or "!UP1", or "" if it is always executed.
        opcode: with its modifiers, such as "MUFU.EX2".
        stall: cycles until the same warp issues the next one, at least.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    stall: int

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


def parse_sass(text: str) -> "Code":
    """One kernel's code, printed with its control information."""
    instructions, labels, waiting = [], {}, []
    for line in text.splitlines():
        if found := _LABEL.match(line):
            waiting.append(found[1])
        elif found := _LINE.match(line):
            labels |= dict.fromkeys(waiting, len(instructions))
            waiting.clear()
            instructions.append(
                Instruction(
                    int(found["address"], 16),
                    found["predicate"] or "",
                    found["opcode"],
                    found["operands"].strip(),
                    int(found["stall"]),
                )
            )
    return Code(tuple(instructions), labels)


class Code:
    """The instructions of a kernel, and which may follow which."""

    def __init__(self, instructions: tuple[Instruction, ...], labels: dict[str, int]):
        self.instructions, self._labels = instructions, labels

    @functools.cached_property
    def loops(self) -> list[tuple[Instruction, ...]]:
        """A turn of each innermost loop, in the order of the code; waiting is no loop."""
        bodies = self._bodies()
        alone = [header for header, body in bodies.items() if not (set(bodies) - {header}) & body]
        waits = {header for header in alone if self._only_waits(bodies[header])}
        inner = set(bodies) - waits
        innermost = [header for header in sorted(inner) if not (inner - {header}) & bodies[header]]
        return [self._turn(header, bodies[header], waits) for header in innermost]

    @functools.cached_property
    def _successors(self) -> list[tuple[int, ...]]:
        return [self._followers(index) for index in range(len(self.instructions))]

    def _followers(self, index: int) -> tuple[int, ...]:
        this = self.instructions[index]
        after = (index + 1,) if index + 1 < len(self.instructions) else ()
        if this.name == "BRA":
            target = _TARGET.search(this.operands)
            to = (self._labels[target[1]],) if target else ()
            conditional = this.predicate or not this.operands.startswith("`")
            return (*after, *to) if conditional else to
        ends = this.name in _ENDS and not this.predicate
        return () if ends else after

    @functools.cached_property
    def _order(self) -> list[int]:
        """What can be reached from the first instruction, in reverse postorder."""
        order: list[int] = []
        seen, waiting = {0}, [(0, iter(self._successors[0]))]
        while waiting:
            index, followers = waiting[-1]
            for follower in followers:
                if follower not in seen:
                    seen.add(follower)
                    waiting.append((follower, iter(self._successors[follower])))
                    break
            else:
                order.append(index)
                waiting.pop()
        return order[::-1]

    @functools.cached_property
    def _predecessors(self) -> dict[int, list[int]]:
        predecessors = collections.defaultdict(list)
        for index in self._order:
            for follower in self._successors[index]:
                predecessors[follower].append(index)
        return predecessors

    @functools.cached_property
    def _dominator(self) -> dict[int, int]:
        """The immediate dominator of each instruction."""
        place = {index: at for at, index in enumerate(self._order)}
        dominator = {0: 0}

        def meet(a: int, b: int) -> int:
            while a != b:
                a, b = (dominator[a], b) if place[a] > place[b] else (a, dominator[b])
            return a

        changed = True
        while changed:
            changed = False
            for index in self._order[1:]:
                known = [x for x in self._predecessors[index] if x in dominator]
                found = functools.reduce(meet, known)
                changed |= dominator.get(index) != found
                dominator[index] = found
        return dominator

    def _bodies(self) -> dict[int, set[int]]:
        """By its first instruction, what can be reached of a loop and comes back to there."""
        bodies: dict[int, set[int]] = {}
        for index in self._order:
            for header in self._successors[index]:
                if self._dominates(header, index):
                    bodies.setdefault(header, {header}).update(self._leading_to(index, header))
        return bodies

    def _dominates(self, header: int, index: int) -> bool:
        while index > 0 and index != header:
            index = self._dominator[index]
        return index == header

    def _leading_to(self, last: int, header: int) -> set[int]:
        body, waiting = {header}, [last]
        while waiting:
            index = waiting.pop()
            if index not in body:
                body.add(index)
                waiting += self._predecessors[index]
        return body

    def _only_waits(self, body: set[int]) -> bool:
        asks = any(self.instructions[i].opcode.startswith(_ASKS) for i in body)
        return asks and len(body) <= _SHORT

    def _turn(self, header: int, body: set[int], waits: set[int]) -> tuple[Instruction, ...]:
        """The way back to the header that asks again least, and of these the longest."""
        best: dict[int, tuple[int, int, int | None]] = {}  # waits and instructions left, next one
        for index in (x for x in reversed(self._order) if x in body):
            ways = [
                (0, 0, None) if x == header else (*best[x][:2], x)
                for x in self._successors[index]
                if x == header or x in best
            ]
            if ways:
                waiting, left, follower = max(ways, key=lambda way: way[:2])
                best[index] = waiting - (index in waits), left + 1, follower
        turn, at = [], header
        while at is not None:
            turn.append(self.instructions[at])
            at = best[at][2]
        return tuple(turn)
