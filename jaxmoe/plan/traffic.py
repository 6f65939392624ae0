"""Bytes of memory that each operation of a compiled program reads and writes, by its HLO.

    traffic = Traffic(lowered.compile().as_text())
    print(traffic.of("fusion.7"))

An operation reads its operands and writes its results, each once. Of an operand that it only cuts
slices from, or replaces a part of, the slices count. What the compiler placed on chip does not
count, nor do results that share the memory of an operand. A kernel may read less of its operands
than all: `share` says how much.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator

from jaxmoe.plan.operations import Instruction, Program

_ARRAY = re.compile(r"\b([a-z]+\d[a-z\d]*|pred)\[([\d,]*)\](\{[^}]*\})?")
_BITS = re.compile(r"\d+")
_ON_CHIP = re.compile(r"S\([1-9]")
_OPERANDS = re.compile(r"%([\w.\-]+)")
_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{")
_CUTS = frozenset(("dynamic-slice", "gather", "slice"))
_VIEWS = frozenset("bitcast copy-done copy-start get-tuple-element opt-barrier".split())
_UPDATE = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that replaces a part of the first


def whole(name: str) -> float:
    """The share of a parameter that kernels read, whatever its name: all of it."""
    return 1.0


class Traffic:
    """The bytes of a program's operations.

    Args:
        text: the optimized HLO.
        share: the share of a parameter of the program, by its name such as "cache.layers[3].k",
            that a kernel reads which has it as an operand.
        on_chip: whether what the compiler placed on chip counts too.
    """

    def __init__(self, text: str, share: Callable[[str], float] = whole, *, on_chip: bool = False):
        self._share, self._on_chip = share, on_chip
        self._computations = Program(text).computations
        everything = (x for each in self._computations.values() for x in each)
        self._instructions = {instruction.name: instruction for instruction in everything}

    def of(self, name: str) -> int:
        """Bytes that the HLO instruction of this name reads and writes."""
        this = self._instructions[name]
        if this.kind == "fusion":
            return self._of_fusion(this)
        if this.kind in _CUTS:
            return 2 * self._result(this)
        if this.kind in _UPDATE:
            return 2 * self._result(self._operands(this)[_UPDATE[this.kind]])
        if this.kind == "copy-start":  # its result has the destination and the source
            return self._result(this)
        if this.kind == "slice-start":  # its result has the source, the destination and a flag
            (_, (size, on_chip), _) = _sized(_type(this))
            return size if on_chip else 2 * size
        return self._of_whole(this)

    def parameters(self) -> dict[str, int]:
        """Bytes of each parameter of the program, by its name."""
        named = ((self._parameter(x), x) for x in self._instructions.values())
        return {name: self._logical(x) for name, x in named if name}

    def moved(self, name: str) -> list[int]:
        """Bytes of each array of an instruction's result, on chip too."""
        return [size for size, _ in _sized(_type(self._instructions[name]))]

    def operand_shapes(self, name: str) -> list[tuple[int, ...]]:
        """The shapes of an instruction's operands that are arrays, in order."""
        types = (_type(x) for x in self._operands(self._instructions[name]))
        found = (_ARRAY.findall(text) for text in types)
        return [
            tuple(int(n) for n in arrays[0][1].split(",") if n)
            for arrays in found
            if len(arrays) == 1
        ]

    def _of_whole(self, this: Instruction) -> int:
        aliases = _ALIAS.findall(_alias_text(this))
        results = self._arrays(this)
        shared = {int(result or 0) for result, _ in aliases}
        written = sum(size for i, size in enumerate(results) if i not in shared)
        replaced = {int(operand) for _, operand in aliases}
        share = self._share if this.kind == "custom-call" else whole
        operands = (x for i, x in enumerate(self._operands(this)) if i not in replaced)
        read = (self._result(x) * share(self._parameter(x)) for x in operands)
        return written + int(sum(read))

    def _of_fusion(self, fusion: Instruction) -> int:
        """Parameters of which the fusion only takes slices count as these."""
        inside = self._computations[fusion.called[0]]
        users = {x.name: [user for user in inside if x.name in _names(user)] for x in inside}
        parameters = {_number(x): x for x in inside if x.kind == "parameter"}
        replaced = {self._source(_names(x)[0]): x for x in inside if x.kind in _UPDATE}
        total = 0
        for number, operand in enumerate(self._operands(fusion)):
            name = parameters[number].name
            if name not in replaced:
                cuts = self._cuts(name, users)
                full = self._result(operand)
                total += full if cuts is None else min(full, sum(map(self._logical, cuts)))
        return total + self._written(fusion, list(replaced.values()))

    def _cuts(self, name: str, users: dict) -> list[Instruction] | None:
        """The slices that are all of a parameter's uses; None if it is used otherwise."""
        found: list[Instruction] = []
        for user in users[name]:
            if user.kind in _VIEWS:
                inner = self._cuts(user.name, users)
                if inner is None:
                    return None
                found += inner
            elif user.kind in _CUTS and _names(user)[0] == name:
                found.append(user)
            else:
                return None
        return found

    def _written(self, fusion: Instruction, updates: list[Instruction]) -> int:
        """Bytes of the results, of those that replace a part of an operand only the part."""
        results = sorted(self._arrays(fusion), reverse=True)
        parts = [self._logical(self._operands(x)[_UPDATE[x.kind]]) for x in updates]
        return sum(results[len(updates) :]) + 2 * sum(parts)

    def _source(self, name: str) -> str:
        """The name of the instruction that a view in a fusion is of."""
        this = self._instructions[name]
        return self._source(_names(this)[0]) if this.kind in _VIEWS else name

    def _parameter(self, this: Instruction) -> str:
        """The name of the program's parameter that an instruction is a view of; else ""."""
        while this.kind in _VIEWS and _names(this):
            this = self._instructions[_names(this)[0]]
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', this.line)
        return found[1].replace("\\'", "'") if found and this.kind == "parameter" else ""

    def _operands(self, this: Instruction) -> list[Instruction]:
        return [self._instructions[name] for name in _names(this)]

    def _result(self, this: Instruction) -> int:
        return sum(self._arrays(this))

    def _arrays(self, this: Instruction) -> list[int]:
        """Bytes of each array of the result; 0 of those that do not count."""
        return [size if self._on_chip or not chip else 0 for size, chip in _sized(_type(this))]

    def _logical(self, this: Instruction) -> int:
        """Bytes of a result wherever it is."""
        return sum(size for size, _ in _sized(_type(this)))


def _type(this: Instruction) -> str:
    """The type of the result, as text."""
    return this.line.partition(" = ")[2].partition(f" {this.kind}(")[0]


def _alias_text(this: Instruction) -> str:
    return this.line.partition("output_to_operand_aliasing={")[2].partition("})}")[0]


def _names(this: Instruction) -> list[str]:
    """The names of the operands."""
    return _OPERANDS.findall(this.line.partition(f" {this.kind}(")[2].partition(")")[0])


def _number(parameter: Instruction) -> int:
    return int(parameter.line.partition(" parameter(")[2].partition(")")[0])


def _sized(text: str) -> Iterator[tuple[int, bool]]:
    """For each array of a type its bytes, and whether it is on chip."""
    for element, shape, layout in _ARRAY.findall(text):
        count = math.prod(int(n) for n in shape.split(",") if n)
        yield count * _bits(element) // 8, bool(_ON_CHIP.search(layout or ""))


@functools.cache
def _bits(element: str) -> int:
    """Bits of an element, which its name says; a boolean takes a byte."""
    bits = _BITS.search(element)
    return int(bits[0]) if bits else 8
