"""Lists the operations that a device runs for a compiled program: their kind, layer and source.

    operations = entry_operations(lowered.compile(options))
    print(count_kinds(of_layer(operations, 3)))
    print(marginal_operations(compile_layers, 4))  # what each further layer adds, by kind

All is static: read from the optimized HLO, not measured. On a GPU each operation is at least one
launch.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

_ROOT = Path(__file__).parents[2]
_NO_WORK = frozenset(
    "add-dependency after-all bitcast constant get-tuple-element opt-barrier parameter "
    "partition-id replica-id tuple".split()
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>\S+) = .*?\s(?P<kind>[a-z][a-z\d\-]*)\(")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|condition|body|branch_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_OP_NAME = re.compile(r'\bop_name="((?:[^"\\]|\\.)*)"')
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_LAYER = re.compile(r"\blayer_(\d+)\b")
_TABLE_ROW = re.compile(r'^(\d+) (?:"(.*)"|\{(.*)\})$')


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a device.

    Attributes:
        kind: the HLO opcode, such as "fusion" or "all-reduce". An asynchronous pair, such as
            all-reduce-start and all-reduce-done, is one operation.
        name: the HLO instruction's name.
        op: the scopes and the JAX primitive that it comes from, relative to its layer's scope.
        layer: the number in the scope `layer_<number>`; None outside layers, or if the compiler
            does not say. Work that layers share counts for the first of them.
        source: file and line of the caller in this project, or "".
        inside: the operations of one iteration of a `while`, or of all branches of a `conditional`.
    """

    kind: str
    name: str
    op: str = ""
    layer: int | None = None
    source: str = ""
    inside: tuple["Operation", ...] = ()


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO text, which has an instruction of this name and kind."""

    name: str
    kind: str
    line: str

    @functools.cached_property
    def called(self) -> list[str]:
        """Names of the computations that the instruction calls."""
        return [
            name.strip().lstrip("%")
            for several, one in _CALLED.findall(self.line)
            for name in (several or one).split(",")
        ]

    @property
    def op_name(self) -> str:
        """The scopes and the JAX primitive it comes from; "" if the compiler does not say."""
        op_name = _OP_NAME.search(self.line)
        return op_name[1] if op_name and "/" in op_name[1] else ""

    @property
    def frame(self) -> str | None:
        """The stack frame that it comes from, as a key of the text's tables."""
        frame = _FRAME.search(self.line)
        return frame[1] if frame else None


def entry_operations(compiled: jax.stages.Compiled | str) -> list[Operation]:
    """The operations of a compiled program, or of its HLO text, in scheduled order.

    Operations in the body of a loop or branch are listed in that operation's `inside` only.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text() or ""
    program = Program(text)
    return program.operations(program.entry)


def of_layer(operations: Iterable[Operation], layer: int | None) -> list[Operation]:
    """The operations of one layer; with None, the operations outside layers."""
    return [operation for operation in operations if operation.layer == layer]


def count_kinds(operations: Iterable[Operation]) -> collections.Counter[str]:
    """The number of operations of each kind."""
    return collections.Counter(operation.kind for operation in operations)


def marginal_operations(
    compile_layers: Callable[[int], jax.stages.Compiled | str], layers: int
) -> dict[str, float]:
    """The number of operations of each kind that one further layer adds.

    It is the difference of a program with 2 * layers layers and one with `layers`, divided by
    `layers`. Work that layers share, and work outside them, cancels out.

    Args:
        compile_layers: compiles the program with a given number of layers.
        layers: the number of layers; a multiple of the period in which kinds of layers repeat.
    """
    once, twice = (count_kinds(entry_operations(compile_layers(n))) for n in (layers, 2 * layers))
    twice.subtract(once)
    return {kind: count / layers for kind, count in sorted(twice.items()) if count}


class Program:
    """A parsed HLO text: its computations, and its tables of source locations."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self._tables: dict[str, dict[str, str]] = collections.defaultdict(dict)
        table = name = ""
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                name = header["name"]
                self.computations[name] = []
                self.entry = name if header["entry"] else self.entry
            elif fields := _INSTRUCTION.match(line):
                self.computations[name].append(Instruction(fields["name"], fields["kind"], line))
            elif row := _TABLE_ROW.match(line):
                self._tables[table][row[1]] = row[2] or row[3]
            elif line.isalpha():
                table = line

    def operations(self, computation: str) -> list[Operation]:
        """The operations of one computation; a `call` is replaced by the operations it calls."""
        instructions = self.computations[computation]
        users = _users(instructions)
        result = []
        for x in instructions:
            if x.kind == "call":
                result += self.operations(x.called[0])
            elif x.kind not in _NO_WORK and not x.kind.endswith(("-done", "-update")):
                result.append(self._operation(x, users))
        return result

    def _operation(
        self, instruction: Instruction, users: dict[str, list[Instruction]]
    ) -> Operation:
        inside: list[Operation] = []
        if instruction.kind in ("while", "conditional"):
            inside = [op for name in instruction.called for op in self.operations(name)]
        origin = self._origin(instruction, users)
        layer = _LAYER.search(origin.op_name)
        return Operation(
            instruction.kind.removesuffix("-start"),
            instruction.name,
            origin.op_name[layer.end() + 1 :] if layer else origin.op_name,
            int(layer[1]) if layer else None,
            self._source(origin.frame),
            tuple(inside),
        )

    def _origin(self, instruction: Instruction, users: dict[str, list[Instruction]]) -> Instruction:
        """The instruction whose metadata says where the given one comes from.

        It is the instruction itself, unless the compiler gave it no metadata: then it is a part of
        a fusion, or the nearest instruction that uses its result, such as that of a copy.
        """
        waiting, seen = [instruction], set()
        while waiting:
            this = waiting.pop(0)
            if this.op_name:
                return this
            if this.name not in seen:
                seen.add(this.name)
                waiting += self._fused(this) or users[this.name]
        return instruction

    def _fused(self, fusion: Instruction) -> list[Instruction]:
        """The parts of a fusion that have metadata, last first; empty for other instructions."""
        called = fusion.called if fusion.kind == "fusion" else []
        parts = [part for name in called for part in reversed(self.computations[name])]
        return [part for part in parts if part.op_name]

    def _source(self, frame: str | None) -> str:
        """FILE:LINE of a stack frame, relative to this project if the file is in it; else ""."""
        location = self._row("FileLocations", self._row("StackFrames", frame)["file_location_id"])
        file = self._tables["FileNames"].get(location["file_name_id"], "")
        if not file:
            return ""
        path = Path(file)
        shown = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path.name
        return f"{shown}:{location['line']}"

    def _row(self, table: str, key: str | None) -> dict[str, str]:
        pairs = (pair.split("=") for pair in self._tables[table].get(key or "", "").split())
        return collections.defaultdict(str, ((name, value) for name, value in pairs))


def _users(instructions: list[Instruction]) -> dict[str, list[Instruction]]:
    """For each instruction's name, the instructions that use its result."""
    users = collections.defaultdict(list)
    for instruction in instructions:
        for operand in _OPERAND.findall(instruction.line):
            users[operand].append(instruction)
    return users
