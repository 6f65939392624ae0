"""What bounds the hot loops of a compiled Hopper kernel: cycles by resource, from machine code.

    (report,) = assembler_reports(lowered, options, disassemble=True)
    for loop in hot_loops(report):
        print(loop.name, loop.counts, loop.cycles(processor))

Static: from the compiler's output, not a measurement. A multiprocessor has four parts, and each
part a warp of every warpgroup. `cycles` says how long one warp's turn keeps each resource of its
part busy; the largest is the bound that it would reach if nothing waited and all resources worked
side by side. Latencies, the copying warpgroup and what surrounds the loop are not in it.
"""

import dataclasses
import functools
import re

from pallas_kernels.compile.assembler import KernelReport
from pallas_kernels.compile.sass import Instruction, parse_sass

# Opcodes by what they are. HADD2 and HMUL2 are here what widens integers and halves.
KINDS = {
    "products": {"HGMMA", "IGMMA", "QGMMA"},
    "mufu": {"MUFU"},
    "fma": {"FADD", "FFMA", "FMUL"},
    "imad": {"IMAD"},
    "alu": set(
        "FMNMX FSEL FSETP IADD3 ISETP LEA LOP3 MOV PLOP3 PRMT SEL SGXT SHF VIADD VIMNMX".split()
    ),
    "convert": {"F2FP", "HADD2", "HFMA2", "HMUL2", "I2FP"},
    "convert_slowly": {"F2F", "F2I", "FRND", "I2F"},
    "shared": {"LDS", "LDSM", "STS", "STSM"},
    "global": {"LD", "LDG", "LDL", "ST", "STG", "STL"},
    "shuffle": {"SHFL"},
    "barrier": {"BAR"},
}
# How many cycles an instruction keeps a unit of one part busy: so many does ptxas leave between two
# of them in one warp (`Instruction.stall`). NVIDIA publishes the same: of a part, 32 lanes add and
# multiply, 16 compare, select, shift and pack, and 4 take exponentials.
UNITS = {
    "alu": {"alu": 2, "F2FP": 2, "I2FP": 2},
    "fma": {"fma": 1, "imad": 2, "HADD2": 2, "HFMA2": 2, "HMUL2": 2},
    "mufu": {"mufu": 8, "convert_slowly": 8},
    "load/store": {"shared": 4, "global": 4, "shuffle": 4},
}
TENSOR_FLOPS = 4096  # a cycle of a multiprocessor, in 16 bits
_SHAPE = re.compile(r"\.64x(\d+)x(\d+)\.")
_GROUPS = re.compile(r"gsb0, 0x([0-9a-f]+)")
_WAIT = "WARPGROUP.DEPBAR"


@dataclasses.dataclass(frozen=True)
class Processor:
    """Multiprocessors and their memory.

    Attributes:
        clock: cycles a second.
        bandwidth: bytes of memory that all of them read a second.
    """

    cores: int
    clock: float
    bandwidth: float

    @classmethod
    def of(cls, cores: int, flops: float, bandwidth: float) -> "Processor":
        """From a vendor's figures, at the clock at which its arithmetic is what it says."""
        return cls(cores, flops / cores / TENSOR_FLOPS, bandwidth)

    def per_second(self, per_cycle: float | int) -> float:
        """The rate of all multiprocessors, where one does `per_cycle` a cycle."""
        return per_cycle * self.clock * self.cores


@dataclasses.dataclass(frozen=True)
class HotLoop:
    """One turn of a loop, of one warp of each warpgroup that runs it.

    Attributes:
        name: "masked" for the one of two loops that compares more, else "".
        turn: its instructions.
        element: bytes of an element of the products' operand with 64 rows, if each is read from
            memory once, as the keys of decoding are.
    """

    name: str
    turn: tuple[Instruction, ...]
    element: float | int | None = None

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """Instructions by kind, and `slots`: all, each of which takes a cycle to issue."""
        names = [each.name for each in self.turn]
        kinds = {kind: sum(name in of for name in names) for kind, of in KINDS.items()}
        return {"slots": len(names), **kinds}

    def _count(self, kind: str) -> int:
        """How many instructions are of a kind, or have an opcode."""
        return self.counts.get(kind, _count(self.turn, kind))

    @property
    def _products(self) -> list[tuple[int, int]]:
        """n and k of each m64nNkK."""
        shapes = (_SHAPE.search(x.opcode) for x in self.turn if x.name in KINDS["products"])
        return [(int(shape[1]), int(shape[2])) for shape in shapes if shape]

    @property
    def read_bytes(self) -> float | None:
        """What a warpgroup reads from memory in a turn, of what is read once."""
        if self.element is None:
            return None
        return float(self.element * sum(64 * k for _, k in self._products))

    def cycles(self, processor: Processor) -> dict[str, float]:
        """How long each resource is busy with a turn; memory, for one multiprocessor's share.

        A product of 16 bits, m64nNk16, is 2 * 64 * N * 16 operations, 4,096 a cycle: N / 2 cycles.
        One of 8 bits has twice the k at twice the rate.
        """
        found = {
            "issue": float(self.counts["slots"]),
            "tensor": sum((n / 2 for n, _ in self._products), 0.0),
        }
        for unit, busy in UNITS.items():
            found[unit] = sum((n * self._count(x) for x, n in busy.items()), 0.0)
        if self.read_bytes:
            found["memory"] = self.read_bytes / (processor.bandwidth / processor.per_second(1))
        return found

    def read_rate(self, processor: Processor) -> float | None:
        """Bytes a second that would be read if memory were no bound."""
        if self.read_bytes is None:
            return None
        others = (n for unit, n in self.cycles(processor).items() if unit != "memory")
        return processor.per_second(self.read_bytes / max(others))

    @property
    def between_waits(self) -> list[dict[str, int]]:
        """From each wait for products until the next, in a circle: what is issued there.

        `running` is how many groups of products the first wait lets run on.
        """
        waits = [i for i, each in enumerate(self.turn) if each.opcode.startswith(_WAIT)]
        pairs = zip(waits, [*waits[1:], *waits[:1]], strict=True)
        return [
            {
                "running": _running(self.turn[begin]),
                "products": sum(each.name in KINDS["products"] for each in part),
                "mufu": sum(each.name in KINDS["mufu"] for each in part),
            }
            for begin, end in pairs
            for part in [(self.turn * 2)[begin : end if end > begin else end + len(self.turn)]]
        ]

    @property
    def mufu_under_products(self) -> int:
        """How many MUFU are issued while products run, of groups that are complete or begun."""
        running, begun, under = 0, False, 0
        for number, each in enumerate(self.turn * 2):  # the first turn finds what runs at the start
            if each.name in KINDS["products"]:
                begun = "gsb0" not in each.operands  # the last of a group
                running += not begun
            elif each.opcode.startswith(_WAIT):
                running = min(running, _running(each))
            elif each.name in KINDS["mufu"] and number >= len(self.turn):
                under += begun or running > 0
        return under


def hot_loops(report: KernelReport, element: float | int | None = None) -> list[HotLoop]:
    """The loops with products, or else the longest one; the unmasked before the masked.

    Args:
        report: with machine code.
        element: as of `HotLoop`.
    """
    loops = parse_sass(report.sass).loops
    hot = [turn for turn in loops if _count(turn, *KINDS["products"])]
    hot = hot or sorted(loops, key=len)[-1:]
    hot.sort(key=lambda turn: _count(turn, "ISETP", "FSEL"))
    names = ["", "masked"] if len(hot) == 2 else [""] * len(hot)
    return [HotLoop(name, turn, element) for name, turn in zip(names, hot, strict=True)]


def _count(turn: tuple[Instruction, ...], *names: str) -> int:
    return sum(each.name in names for each in turn)


def _running(wait: Instruction) -> int:
    found = _GROUPS.search(wait.operands)
    return int(found[1], 16) if found else 0
