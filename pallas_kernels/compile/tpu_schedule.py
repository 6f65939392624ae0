"""Computes what bounds the hot loop of a compiled TPU kernel: bundles by unit, and copied bytes.

    _, codes = dumped(compile_decode, "v5p:2x2x1")
    for path in hot_paths(codes["decode_attention.1"], copied=2**21):
        print(path.name, path.cycles(Core.of("v5p", 2, 459e12, 2.765e12)))

All is static: from the compiler's output, not measured. A core issues one bundle a cycle if it
waits for nothing, so that an iteration takes at least as many cycles as its path has bundles, and
at least as many as its copies take at the core's share of the bandwidth. Copies run beside the
bundles: if there are more cycles of copies, the schedule leaves the kernel bound by memory.
"""

import dataclasses

from pallas_kernels.compile.bundles import FILL, SPILL, Code, Work
from pallas_kernels.compile.errors import CompilerError
from pallas_kernels.compile.paths import Loop, Needs, Path, whole

# Floating-point operations of a core's matrix units in a cycle: units, rows of both operands that
# they multiply, two operations each. A v6e unit takes two rows a cycle: the compiler counts it as
# busy for 8 bundles by 16 rows of a product, a v5p unit for about 16.
PRODUCT_FLOPS = {"v5p": 4 * 128 * 128 * 2, "v6e": 2 * 256 * 256 * 2 * 2}


@dataclasses.dataclass(frozen=True)
class Core:
    """What a TPU's cores do in a second.

    Attributes:
        cores: how many cores a chip has; they share its memory.
        clock: bundles that a core issues in a second.
        bandwidth: bytes per second of a chip's memory.
        product_flops: operations of a core's matrix units in a cycle.
    """

    cores: int
    clock: float
    bandwidth: float
    product_flops: int

    @classmethod
    def of(cls, kind: str, cores: int, flops: float, bandwidth: float) -> "Core":
        """The cores of a vendor's figures, with the clock that they imply.

        Args:
            kind: one of `PRODUCT_FLOPS`.
            cores: how many cores a chip has.
            flops: dense bfloat16 operations per second of a chip.
            bandwidth: bytes per second of a chip's memory.
        """
        in_a_cycle = PRODUCT_FLOPS[kind]
        return cls(cores, flops / cores / in_a_cycle, bandwidth, in_a_cycle)

    @property
    def bytes_per_cycle(self) -> float:
        """Bytes of memory in a cycle for each core, if all cores read."""
        return self.bandwidth / self.cores / self.clock


@dataclasses.dataclass(frozen=True)
class HotPath:
    """One iteration of a kernel's hot loop on one core.

    Attributes:
        name: "" for the path of the steady state; of a second one "dearest".
        code: the kernel's code.
        path: the path.
        copied: bytes that the iteration copies from memory.
        flops: floating-point operations of its matrix products; 0 if they do not fill the units.
    """

    name: str
    code: Code
    path: Path
    copied: float | int
    flops: int

    @property
    def work(self) -> Work:
        """What the bundles of the path do."""
        return self.path.work

    @property
    def units(self) -> dict[str, float]:
        """For each unit how many bundles suffice for what it does."""
        return {unit: self.work.uses[unit] / most for unit, most in self.code.units.items()}

    @property
    def spills(self) -> int:
        """How many registers are written to VMEM or read back because there are too few."""
        return self.work.uses[FILL] + self.work.uses[SPILL]

    @property
    def addresses(self) -> list[str]:
        """The addresses of the bundles of the path, and of the headers of loops in it."""
        ranges = (self.code.address(node) for node in self.path.nodes)
        return [f"{first:#x}-{last:#x}" for first, last in ranges]

    def cycles(self, core: Core) -> dict[str, float]:
        """The least cycles of the iteration by what takes them; the largest bounds it.

        A code on one core of several is given the bandwidth of the whole chip, which favors it: a
        core alone may not reach it.
        """
        return {
            "bundles": float(self.work.bundles),
            "products": self.flops / core.product_flops,
            "memory": self.copied / core.bytes_per_cycle / (core.cores if self.alone else 1),
        }

    def per_second(self, core: Core, amount: float | int) -> float:
        """The rate of something that an iteration does, on all cores that run the code."""
        slowest = max(self.cycles(core).values())
        return amount / slowest * core.clock * (1 if self.alone else core.cores)

    @property
    def alone(self) -> bool:
        """Whether one core runs the code, and the others wait."""
        return self.code.on_one_core


def hot_loop(code: Code) -> Loop:
    """The innermost loop that multiplies matrices and copies from memory; else the whole code."""
    total = {loop: loop.total for loop in whole(code).all_inner}
    loops = [loop for loop, work in total.items() if work.products and work.copies]
    return min(loops, key=lambda loop: len(loop.body), default=whole(code))


def hot_paths(code: Code, copied: float | int = 0, flops: int = 0) -> list[HotPath]:
    """The steady state's path through the hot loop, and the dearest one if there are several.

    The path of the steady state has the fewest bundles of those that multiply matrices, and that
    start and await copies of `copied` bytes. Blocks that need a mask have products of their own, in
    another branch. For each branch with products there is a path with the fewest bundles, and the
    dearest is the longest of these. Branches with less than half of the most products do not count.

    Args:
        code: the kernel's code.
        copied: bytes that an iteration copies from memory.
        flops: as of `HotPath`.

    Raises:
        CompilerError: if no path waits for as many bytes.
    """
    loop = hot_loop(code)
    products = {node: work.products for node, work in loop.works.items()}
    enough = max(1, max(products.values()) / 2)
    branches = [node for node, count in products.items() if count >= enough] or [loop.header]
    paths = {path.nodes: path for x in branches for path in [loop.cheapest(Needs(copied, x))]}
    found = sorted(paths.values(), key=lambda path: path.work.bundles)
    if found[0].work.waited < copied:
        raise CompilerError(f"no path through the hot loop waits for copies of {copied} bytes.")
    ends = found if len(found) == 1 else (found[0], found[-1])
    named = zip(("", "dearest"), ends, strict=False)
    return [HotPath(name, code, path, copied, flops) for name, path in named]
