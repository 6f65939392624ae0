"""Parses NVIDIA's machine code (SASS) as nvdisasm prints it, and finds the iterations of loops.

An iteration of a loop is the sequence of instructions that one warp issues from the loop's first
instruction until it is back there: the longest path on which no barrier is polled twice. All is
static: read from the code, not measured.
"""

import dataclasses
import functools
import re

from pallas_kernels.compile.flow import Flow

_LINE = re.compile(
    r"^\s*(?P<waits>\S+?):(?P<read>\S):(?P<write>\S):(?P<yields>\S):(?P<stall>\d\d)\s+"
    r"/\*(?P<address>[0-9a-f]+)\*/\s+(?:@(?P<predicate>!?\w+)\s+)?(?P<opcode>[A-Z][\w.]*)"
    r"(?P<operands>[^;/]*)"
)
_LABEL = re.compile(r"^(\.\w+):$")
_TARGET = re.compile(r"`\((\.\w+)\)")
_ENDS = ("EXIT", "RET", "KILL", "BPT", "BRX", "JMX")  # end a basic block without a known successor
_POLLS = ("SYNCS.PHASECHK", "USETMAXREG")  # poll a barrier's phase, or wait for registers
_SHORT = 12  # instructions, at most, of a loop that only polls


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        address: its offset in the kernel, in bytes.
        predicate: such as "P0" or "!UP1"; "" if it is always executed.
        opcode: the opcode with its modifiers, such as "MUFU.EX2".
        operands: the operands as text.
        stall: the least number of cycles until the same warp issues its next instruction.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    stall: int

    @property
    def name(self) -> str:
        """The opcode without modifiers, such as "MUFU"."""
        return self.opcode.partition(".")[0]


def parse_sass(text: str) -> "Code":
    """Parses one kernel's code, which must have been printed with control information."""
    instructions, labels, waiting = [], {}, []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif fields := _LINE.match(line):
            labels |= dict.fromkeys(waiting, len(instructions))
            waiting.clear()
            instructions.append(
                Instruction(
                    int(fields["address"], 16),
                    fields["predicate"] or "",
                    fields["opcode"],
                    fields["operands"].strip(),
                    int(fields["stall"]),
                )
            )
    return Code(tuple(instructions), labels)


class Code:
    """A kernel's instructions and their control flow graph."""

    def __init__(self, instructions: tuple[Instruction, ...], labels: dict[str, int]):
        self.instructions, self._labels = instructions, labels

    @functools.cached_property
    def loops(self) -> list[tuple[Instruction, ...]]:
        """One iteration of each innermost loop, in code order.

        Loops that only poll a barrier do not count as loops.
        """
        bodies = self._flow.loops
        alone = [header for header, body in bodies.items() if not (set(bodies) - {header}) & body]
        waits = {header for header in alone if self._only_waits(bodies[header])}
        inner = set(bodies) - waits
        innermost = [header for header in sorted(inner) if not (inner - {header}) & bodies[header]]
        return [self._iteration(header, bodies[header], waits) for header in innermost]

    @functools.cached_property
    def _flow(self) -> Flow:
        return Flow([self._followers(index) for index in range(len(self.instructions))])

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

    def _only_waits(self, body: set[int]) -> bool:
        polls = any(self.instructions[i].opcode.startswith(_POLLS) for i in body)
        return polls and len(body) <= _SHORT

    def _iteration(self, header: int, body: set[int], waits: set[int]) -> tuple[Instruction, ...]:
        """The path from the header back to it with the fewest polls, and of these the longest.

        Args:
            header: the loop's first instruction.
            body: the loop's instructions.
            waits: headers of the loops that only poll.
        """
        # For each instruction: minus the polls and the instructions left, and the next instruction.
        best: dict[int, tuple[int, int, int | None]] = {}
        for index in (x for x in reversed(self._flow.order) if x in body):
            paths = [
                (0, 0, None) if x == header else (*best[x][:2], x)
                for x in self._flow.successors[index]
                if x == header or x in best
            ]
            if paths:
                polls, left, follower = max(paths, key=lambda path: path[:2])
                best[index] = polls - (index in waits), left + 1, follower
        iteration, index = [], header
        while index is not None:
            iteration.append(self.instructions[index])
            index = best[index][2]
        return tuple(iteration)
