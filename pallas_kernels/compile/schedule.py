"""Computes what bounds the hot loops of a compiled Hopper kernel: cycles by resource, from SASS.

    (report,) = assembler_reports(lowered, options, disassemble=True)
    for loop in hot_loops(report):
        print(loop.name, loop.counts, loop.cycles(processor))

All is static: from the compiler's output, not measured. A multiprocessor has four partitions, and
each partition runs one warp of every warpgroup. `cycles` says how long one iteration of one warp
keeps each resource of its partition busy; the largest is the time of an iteration if nothing waited
and all resources worked in parallel. Latencies, the copying warpgroup and the code around the loop
are left out.
"""

import dataclasses
import functools
import re

from pallas_kernels.compile.assembler import KernelReport
from pallas_kernels.compile.sass import Instruction, parse_sass

# Opcodes by kind. HADD2 and HMUL2 count as conversions: the kernels widen integers with them.
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
# How many cycles an instruction keeps a unit of its partition busy: the stall that ptxas puts
# between two of them in one warp (`Instruction.stall`). NVIDIA's published rates are the same: in a
# partition 32 lanes add and multiply, 16 compare, select, shift and pack, and 4 do exponentials.
UNITS = {
    "alu": {"alu": 2, "F2FP": 2, "I2FP": 2},
    "fma": {"fma": 1, "imad": 2, "HADD2": 2, "HFMA2": 2, "HMUL2": 2},
    "mufu": {"mufu": 8, "convert_slowly": 8},
    "load/store": {"shared": 4, "global": 4, "shuffle": 4},
}
TENSOR_FLOPS = 4096  # 16-bit operations of a multiprocessor's tensor cores in a cycle
_SHAPE = re.compile(r"\.64x(\d+)x(\d+)\.")
_GROUPS = re.compile(r"gsb0, 0x([0-9a-f]+)")
_WAIT = "WARPGROUP.DEPBAR"


@dataclasses.dataclass(frozen=True)
class Processor:
    """A GPU's compute and memory rates.

    Attributes:
        cores: number of multiprocessors.
        clock: cycles per second.
        bandwidth: bytes per second that all of them together read from memory.
    """

    cores: int
    clock: float
    bandwidth: float

    @classmethod
    def of(cls, cores: int, flops: float, bandwidth: float) -> "Processor":
        """The processor of a vendor's figures, with the clock that they imply.

        Args:
            cores: number of multiprocessors.
            flops: dense bfloat16 operations per second.
            bandwidth: bytes per second of memory.
        """
        return cls(cores, flops / cores / TENSOR_FLOPS, bandwidth)

    def per_second(self, per_cycle: float | int) -> float:
        """The rate per second of all multiprocessors, if one does `per_cycle` in a cycle."""
        return per_cycle * self.clock * self.cores


@dataclasses.dataclass(frozen=True)
class HotLoop:
    """One iteration of a loop, as issued by one warp.

    Attributes:
        name: "masked" for the one of two loops that compares more, otherwise "".
        iteration: the instructions.
        element: bytes per element of the products' operand of 64 rows, if the kernel reads it from
            memory exactly once, as decoding reads keys; otherwise None.
    """

    name: str
    iteration: tuple[Instruction, ...]
    element: float | int | None = None

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """The number of instructions of each kind, and as `slots` of all; each takes one issue."""
        names = [instruction.name for instruction in self.iteration]
        kinds = {kind: sum(x in opcodes for x in names) for kind, opcodes in KINDS.items()}
        return {"slots": len(names), **kinds}

    def _count(self, kind: str) -> int:
        """The number of instructions of a kind of `KINDS`, or with an opcode."""
        return self.counts.get(kind, _count(self.iteration, kind))

    @property
    def _products(self) -> list[tuple[int, int]]:
        """(N, K) of each tensor-core product m64nNkK."""
        shapes = (_SHAPE.search(x.opcode) for x in self.iteration if x.name in KINDS["products"])
        return [(int(shape[1]), int(shape[2])) for shape in shapes if shape]

    @property
    def read_bytes(self) -> float | None:
        """Bytes that a warpgroup reads from memory in an iteration; None if `element` is None."""
        if self.element is None:
            return None
        return float(self.element * sum(64 * k for _, k in self._products))

    def cycles(self, processor: Processor) -> dict[str, float]:
        """How many cycles an iteration keeps each resource busy, by the resource's name.

        A 16-bit product m64nNk16 is 2 * 64 * N * 16 operations at 4,096 a cycle: N / 2 cycles. An
        8-bit product has twice the k at twice the rate. Memory is counted at a multiprocessor's
        share of the bandwidth.
        """
        busy = {
            "issue": float(self.counts["slots"]),
            "tensor": sum((n / 2 for n, _ in self._products), 0.0),
        }
        for unit, cycles in UNITS.items():
            busy[unit] = sum((n * self._count(x) for x, n in cycles.items()), 0.0)
        if self.read_bytes:
            busy["memory"] = self.read_bytes / (processor.bandwidth / processor.per_second(1))
        return busy

    def read_rate(self, processor: Processor) -> float | None:
        """Bytes per second that the loop could read if memory did not bound it."""
        if self.read_bytes is None:
            return None
        others = (n for unit, n in self.cycles(processor).items() if unit != "memory")
        return processor.per_second(self.read_bytes / max(others))

    @property
    def between_waits(self) -> list[dict[str, int]]:
        """The products and exponentials issued from each wait for products to the next.

        The last wait is followed by the first one of the next iteration. `running` is how many
        groups of products may still run after the wait.
        """
        code = self.iteration
        waits = [i for i, x in enumerate(code) if x.opcode.startswith(_WAIT)]
        pairs = zip(waits, [*waits[1:], *waits[:1]], strict=True)
        return [
            {
                "running": _running(code[begin]),
                "products": sum(x.name in KINDS["products"] for x in part),
                "mufu": sum(x.name in KINDS["mufu"] for x in part),
            }
            for begin, end in pairs
            for part in [(code * 2)[begin : end if end > begin else end + len(code)]]
        ]

    @property
    def mufu_under_products(self) -> int:
        """How many MUFU instructions are issued while a product of the same warp runs."""
        running, begun, overlapped = 0, False, 0
        # The first pass only finds which products still run when an iteration begins.
        for number, x in enumerate(self.iteration * 2):
            if x.name in KINDS["products"]:
                begun = "gsb0" not in x.operands  # the last product of a group has it
                running += not begun
            elif x.opcode.startswith(_WAIT):
                running = min(running, _running(x))
            elif x.name in KINDS["mufu"] and number >= len(self.iteration):
                overlapped += begun or running > 0
        return overlapped


def hot_loops(report: KernelReport, element: float | int | None = None) -> list[HotLoop]:
    """A kernel's loops with tensor-core products, or else its longest loop.

    Of two such loops the one that compares more is named "masked" and comes last.

    Args:
        report: the assembler's report, with machine code.
        element: as of `HotLoop`.
    """
    loops = parse_sass(report.sass).loops
    hot = [loop for loop in loops if _count(loop, *KINDS["products"])]
    hot = hot or sorted(loops, key=len)[-1:]
    hot.sort(key=lambda loop: _count(loop, "ISETP", "FSEL"))
    names = ["", "masked"] if len(hot) == 2 else [""] * len(hot)
    return [HotLoop(name, loop, element) for name, loop in zip(names, hot, strict=True)]


def _count(iteration: tuple[Instruction, ...], *names: str) -> int:
    return sum(instruction.name in names for instruction in iteration)


def _running(wait: Instruction) -> int:
    groups = _GROUPS.search(wait.operands)
    return int(groups[1], 16) if groups else 0
