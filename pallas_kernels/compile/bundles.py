"""Parses the bundles that the TPU compiler schedules into basic blocks, and says what these do.

A bundle is what a core issues in a cycle. The compiler writes the bundles of every operation, and
how busy each bundle makes each unit: `parse_code` reads both texts. All is static: read from the
compiler's output, not measured. A core waits where a copy or a result is not there yet, and the
cycles that it waits are in no bundle.
"""

import collections
import dataclasses
import functools
import operator
import re
from collections.abc import Sequence

from pallas_kernels.compile.errors import CompilerError
from pallas_kernels.compile.flow import Flow

DELAY = 4  # bundles behind a branch that run whether or not it is taken, on v5p and v6e
GRANULE = 32  # bytes of the unit in which sizes of copies are written
FILL, SPILL = "VLOAD:FILL", "VSTORE:SPILL"  # units, as the compiler names them

_BUNDLE = re.compile(r"^ *(?:0x)?([0-9a-f]+) +(?:[A-Z]+)? *:[ >]*\{", re.M)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel (?:\(!?(?P<predicate>%\w+)\) )?target = \$region(?P<region>\d+)")
_PRODUCT = re.compile(r"= vmatmul\b")
_STARTED = re.compile(r"dma\.hbm_to_[vs]mem\b[^;]*?/\*size_in_granules=\*/(%?\w+)")
_WAITED = re.compile(r"dma\.done\.wait (?:\(!?%\w+\), )?[^,;]*, (%?\w+)")
_CALLED = re.compile(r"inlined_call [^/]*/\* %(\S+) =")
_COMPARED = re.compile(r"(%\w+) = scmp\.ge\.s32\.totalorder (%\w+), (\d+)\b")
_COUNTED = re.compile(r"(%\w+) = sadd\.s32 1, (%\w+)")
_PHI = re.compile(r"(%\w+) = sphi (%\w+), (%\w+)")
_MOVED = re.compile(r"(%\w+) = smov (?:\(!?%\w+\), )?(\d+)\b")
_SPILLED = re.compile(r"= sst \[smem:\[(#\w+_spill)\]\] (%\w+)")
_RELOADED = re.compile(r"(%\w+) = sld \[smem:\[(#\w+_spill)\]\]")
_CORE = re.compile(r"(%\w+) = sld \[smem:\[#allocation\d+\]\] /\* megacore core id")


@dataclasses.dataclass(frozen=True)
class Work:
    """What bundles do, summed.

    Attributes:
        bundles: how many there are; a core issues one a cycle.
        uses: how many instructions each unit is busy with, as the compiler counts. It counts a
            matrix unit as busy in bundles behind the one that starts a product.
        products: how many instructions multiply matrices.
        copies: bytes of each copy from memory that is started, if its predicate allows it; 0 if the
            size is in a register.
        waited: bytes of copies of any direction that are waited for, so far as they are constant.
        calls: names of the HLO instructions that are called and have bundles of their own.
        loops: how many loops are counted once because it is not known how often they run.
    """

    bundles: int = 0
    uses: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    products: int = 0
    copies: tuple[int, ...] = ()
    waited: int = 0
    calls: tuple[str, ...] = ()
    loops: int = 0

    @property
    def started(self) -> int:
        """Bytes of all copies from memory that are started."""
        return sum(self.copies)

    def __add__(self, other: "Work") -> "Work":
        pairs = zip(_values(self), _values(other), strict=True)
        return Work(*(x + y for x, y in pairs))

    def times(self, count: int) -> "Work":
        """The work of `count` repetitions."""
        return Work(
            self.bundles * count,
            collections.Counter({unit: count * uses for unit, uses in self.uses.items()}),
            self.products * count,
            self.copies * count,
            self.waited * count,
            self.calls * count,
            self.loops,
        )


def _values(work: Work) -> list:
    return [getattr(work, field.name) for field in dataclasses.fields(work)]


@dataclasses.dataclass(frozen=True)
class _Bundle:
    """The text of a bundle, and how many instructions each unit is busy with."""

    text: str
    uses: collections.Counter[str]

    @property
    def address(self) -> int:
        head = _BUNDLE.match(self.text)
        assert head is not None
        return int(head[1], 16)

    @property
    def work(self) -> Work:
        copies, waits = (map(_bytes, pattern.findall(self.text)) for pattern in (_STARTED, _WAITED))
        products, calls = len(_PRODUCT.findall(self.text)), _CALLED.findall(self.text)
        return Work(1, self.uses, products, tuple(copies), sum(waits), tuple(calls))


def _bytes(size: str) -> int:
    """Bytes of a copy; 0 if its size is in a register."""
    return GRANULE * int(size) if size.isdecimal() else 0


def parse_code(bundles: str, utilization: str) -> "Code":
    """Parses the texts `final_bundles` and `final_hlo-static-per-bundle-utilization`.

    Raises:
        CompilerError: if they do not belong together, or are of a form that is not known.
    """
    starts = [match.start() for match in _BUNDLE.finditer(bundles)]
    texts = [bundles[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    units, uses = _parse_uses(utilization)
    if not texts or len(texts) != len(uses):
        raise CompilerError(f"the compiler wrote {len(texts)} bundles and the use of {len(uses)}.")
    return Code(units, [_Bundle(*each) for each in zip(texts, uses, strict=True)])


def _parse_uses(text: str) -> tuple[dict[str, int], list[collections.Counter[str]]]:
    """How many instructions each unit can be busy with, and with how many it is in each bundle."""
    head, _, rows = text.partition("== UTILIZATION:\n")
    names, capacities = head.splitlines()[1:3]
    units = names.split(", ")
    uses = [
        collections.Counter(dict(zip(units, map(int, row.split()), strict=True)))
        for row in rows.splitlines()
        if row
    ]
    return dict(zip(units, map(int, capacities.split()), strict=True)), uses


class Code:
    """The bundles of one operation, and their control flow graph.

    Attributes:
        units: with how many instructions each unit can be busy at once.
    """

    def __init__(self, units: dict[str, int], bundles: Sequence[_Bundle]):
        self.units, self._bundles = units, bundles

    @functools.cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """The first bundle of each basic block, and the one behind its last."""
        ends = {branch + DELAY + 1 for branch in self._branches}
        starts = sorted({0, *self._targets.values(), *ends} - {len(self._bundles)})
        return list(zip(starts, [*starts[1:], len(self._bundles)], strict=True))

    @functools.cached_property
    def works(self) -> list[Work]:
        """The work of each block."""
        each = [bundle.work for bundle in self._bundles]
        return [functools.reduce(operator.add, each[a:b]) for a, b in self.blocks]

    @property
    def on_one_core(self) -> bool:
        """Whether cores other than the first skip all of it, on a chip whose cores share memory."""
        first, end = self.blocks[0]
        text = "".join(bundle.text for bundle in self._bundles[first:end])
        core = _CORE.search(text)
        if core is None:
            return False
        differs = re.search(rf"(%\w+) = scmp\.ne\.s32\.totalorder {core[1]}, 0", text)
        branch = self._branches.get(end - DELAY - 1)
        return bool(differs and branch and branch["predicate"] == differs[1])

    def address(self, block: int) -> tuple[int, int]:
        """The addresses of a block's first and last bundle."""
        first, end = self.blocks[block]
        return self._bundles[first].address, self._bundles[end - 1].address

    @functools.cached_property
    def _regions(self) -> dict[str, int]:
        """The bundle where each region starts."""
        return {
            region: index
            for index, bundle in enumerate(self._bundles)
            for region in _REGION.findall(bundle.text)
        }

    @functools.cached_property
    def _branches(self) -> dict[int, re.Match]:
        found = ((index, _BRANCH.search(x.text)) for index, x in enumerate(self._bundles))
        return {index: branch for index, branch in found if branch}

    @functools.cached_property
    def _targets(self) -> dict[int, int]:
        """For each bundle with a branch, the bundle that it goes to."""
        end = len(self._bundles) - 1  # where a region lies that starts nowhere
        targets = {at: self._regions.get(x["region"], end) for at, x in self._branches.items()}
        inside = {at + i for at in self._branches for i in range(1, DELAY + 1)}
        if inside & ({*targets.values()} | {*targets}):
            raise CompilerError("there are branches from or to the bundles behind a branch.")
        return targets

    @functools.cached_property
    def flow(self) -> Flow:
        """The control flow graph of the blocks."""
        number = {first: block for block, (first, _) in enumerate(self.blocks)}
        return Flow([self._followers(end, number) for _, end in self.blocks])

    def _followers(self, end: int, number: dict[int, int]) -> tuple[int, ...]:
        after = (number[end],) if end in number else ()
        branch = self._branches.get(end - DELAY - 1)
        if branch is None:
            return after
        to = number[self._targets[end - DELAY - 1]]
        return (*after, to) if branch["predicate"] else (to,)

    def trips(self, header: int) -> int | None:
        """How often a loop runs, if it counts by one from a constant to a constant."""
        begin, _ = self.blocks[header]
        back = [self._branches[x] for x, to in self._targets.items() if to == begin and x >= begin]
        for branch in back:
            compared = self._definitions.get(branch["predicate"], ())
            if len(compared) == 2:
                counter, bound = compared
                start = self._start(counter)
                return None if start is None else int(bound) - start
        return None

    def _start(self, counter: str) -> int | None:
        """The number at which a loop's counter starts: that of the phi which is counted up."""
        phi = self._definitions.get(counter, ("",))[0]
        while phi in self._definitions and len(self._definitions[phi]) == 1:  # it was spilled
            (phi,) = self._definitions[phi]
        for name in self._definitions.get(phi, ()):
            constant = self._definitions.get(name, ("",))[0]
            if name != counter and constant.isdecimal():
                return int(constant)
        return None

    @functools.cached_property
    def _definitions(self) -> dict[str, tuple[str, ...]]:
        """The operands of the scalars from which trips of loops are computed, by their names."""
        text = "\n".join(bundle.text for bundle in self._bundles)
        patterns = _COMPARED, _COUNTED, _PHI, _MOVED, _SPILLED, _RELOADED
        found = (match for pattern in patterns for match in pattern.finditer(text))
        return {match[1]: match.groups()[1:] for match in found}
