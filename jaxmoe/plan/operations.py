"""The operations that a device runs for a compiled program: what kind, of which layer, from where.

    operations = entry_operations(lowered.compile(options))
    print(count_kinds(of_layer(operations, 3)))
    print(marginal_operations(compile_layers, 4))  # of each further layer, by kind

Static: read from the optimized HLO, not measured. Each is at least one launch on a GPU.
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
        kind: of HLO, such as "fusion" or "all-reduce"; one that is started and later done is one.
        name: of the instruction.
        op: the scopes and the JAX primitive that it comes from, within its layer if it has one.
        layer: the number in the scope `layer_<number>`; None outside layers, or if the compiler
            does not say. Work that layers share is the first one's.
        source: file and line of the caller in this project, or "".
        inside: what one turn of a `while`, or all branches of a `conditional` together, run.
    """

    kind: str
    name: str
    op: str = ""
    layer: int | None = None
    source: str = ""
    inside: tuple["Operation", ...] = ()


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """One line of HLO text."""

    name: str
    kind: str
    line: str

    @functools.cached_property
    def called(self) -> list[str]:
        """The computations that it calls."""
        return [
            name.strip().lstrip("%")
            for several, one in _CALLED.findall(self.line)
            for name in (several or one).split(",")
        ]

    @property
    def op_name(self) -> str:
        """The scopes and the primitive of JAX; "" if the compiler made it of its own."""
        found = _OP_NAME.search(self.line)
        return found[1] if found and "/" in found[1] else ""

    @property
    def frame(self) -> str | None:
        found = _FRAME.search(self.line)
        return found[1] if found else None


def entry_operations(compiled: jax.stages.Compiled | str) -> list[Operation]:
    """The operations of a compiled program, or of its HLO text, as scheduled.

    Those of loops and branches are not among them but inside theirs.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text() or ""
    program = _Program(text)
    return program.operations(program.entry)


def of_layer(operations: Iterable[Operation], layer: int | None) -> list[Operation]:
    """The operations of one layer; with None, those outside layers."""
    return [each for each in operations if each.layer == layer]


def count_kinds(operations: Iterable[Operation]) -> collections.Counter[str]:
    """How many there are of each kind."""
    return collections.Counter(each.kind for each in operations)


def marginal_operations(
    compile_layers: Callable[[int], jax.stages.Compiled | str], layers: int
) -> dict[str, float]:
    """What each further layer adds, by kind: of twice as many layers less of so many, a layer.

    What layers share, such as a list of tasks, is computed once, and so is what surrounds them: the
    difference has neither. Their sum is the number of operations a layer.

    Args:
        compile_layers: gives the program with so many layers.
        layers: a whole number of periods, if the kinds of layers follow a pattern.
    """
    once, twice = (count_kinds(entry_operations(compile_layers(n))) for n in (layers, 2 * layers))
    twice.subtract(once)
    return {kind: count / layers for kind, count in sorted(twice.items()) if count}


class _Program:
    """The computations of an HLO text, and where its instructions come from."""

    def __init__(self, text: str):
        self.computations: dict[str, list[_Instruction]] = {}
        self.entry = ""
        self._tables: dict[str, dict[str, str]] = collections.defaultdict(dict)
        table = name = ""
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                name = found["name"]
                self.computations[name] = []
                self.entry = name if found["entry"] else self.entry
            elif found := _INSTRUCTION.match(line):
                self.computations[name].append(_Instruction(found["name"], found["kind"], line))
            elif found := _TABLE_ROW.match(line):
                self._tables[table][found[1]] = found[2] or found[3]
            elif line.isalpha():
                table = line

    def operations(self, computation: str) -> list[Operation]:
        """The operations of one computation; a plain call counts as what it calls."""
        instructions = self.computations[computation]
        users = _users(instructions)
        result = []
        for each in instructions:
            if each.kind == "call":
                result += self.operations(each.called[0])
            elif each.kind not in _NO_WORK and not each.kind.endswith(("-done", "-update")):
                result.append(self._operation(each, users))
        return result

    def _operation(self, each: _Instruction, users: dict[str, list[_Instruction]]) -> Operation:
        inside: list[Operation] = []
        if each.kind in ("while", "conditional"):
            inside = [op for name in each.called for op in self.operations(name)]
        origin = self._origin(each, users)
        layer = _LAYER.search(origin.op_name)
        return Operation(
            each.kind.removesuffix("-start"),
            each.name,
            origin.op_name[layer.end() + 1 :] if layer else origin.op_name,
            int(layer[1]) if layer else None,
            self._source(origin.frame),
            tuple(inside),
        )

    def _origin(self, each: _Instruction, users: dict[str, list[_Instruction]]) -> _Instruction:
        """The one whose metadata says where an instruction comes from.

        The compiler gives none to some fusions, whose parts have it, and to copies, whose users do.
        """
        waiting, seen = [each], set()
        while waiting:
            this = waiting.pop(0)
            if this.op_name:
                return this
            if this.name not in seen:
                seen.add(this.name)
                waiting += self._fused(this) or users[this.name]
        return each

    def _fused(self, fusion: _Instruction) -> list[_Instruction]:
        """The parts of a fusion that say where they come from, last first."""
        called = fusion.called if fusion.kind == "fusion" else []
        parts = [part for name in called for part in reversed(self.computations[name])]
        return [part for part in parts if part.op_name]

    def _source(self, frame: str | None) -> str:
        """File and line of a stack frame, relative to this project where it is of it."""
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


def _users(instructions: list[_Instruction]) -> dict[str, list[_Instruction]]:
    """By the name of an instruction, those that take what it gives."""
    users = collections.defaultdict(list)
    for each in instructions:
        for operand in _OPERAND.findall(each.line):
            users[operand].append(each)
    return users
