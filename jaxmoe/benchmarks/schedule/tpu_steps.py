"""The steps of `jaxmoe benchmark schedule` for TPUs, operation by operation.

The least time of an operation is that of its bundles or that of its bytes of memory, whichever is
longer. Their sum is the time of a step in which nothing waits and no two operations overlap.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import Any

import jax

from jaxmoe.benchmarks.schedule.steps import PERIOD
from jaxmoe.benchmarks.schedule.tpu_prefill import Chunk
from jaxmoe.config import PRESETS, Llama4Config
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.kv_cache import round_capacity
from jaxmoe.plan.operations import Operation, entry_operations, marginal_operations, of_layer
from jaxmoe.plan.share import device_share
from jaxmoe.plan.speed import bounds, busy_experts, demand
from jaxmoe.plan.steps import abstract_arguments, lower_step
from jaxmoe.plan.targets import Target, absent_devices, parse_target
from jaxmoe.plan.traffic import Traffic
from jaxmoe.plan.work import Work
from pallas_kernels.compile.bundles import Code
from pallas_kernels.compile.paths import whole
from pallas_kernels.compile.tpu_dump import TOP, dumped
from pallas_kernels.compile.tpu_schedule import Core, hot_loop, hot_paths

# How many arrays a kernel copies block by block, by the start of its name; one if not listed.
ARRAYS = {"decode_attention": 2, "experts_gate_up": 2}
LARGE = 2**20  # bytes from which on a copy of a page pool counts as one
COPIES = frozenset(("copy", "reduce", "reshape", "transpose"))  # also to another layout
SHOWN = 12  # operations that a step lists
_NUMBER = re.compile(r"\.\d+")  # in the names of HLO instructions, to make them one of a kind


@functools.cache
def core_of(target: Target) -> Core:
    """The cores of a TPU, by the figures that the plan has of it."""
    kind, _, _ = str(target.compiler).partition(":")
    cores = absent_devices(target)[0].num_cores
    return Core.of(kind, cores, target.flops, target.bandwidth)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What operations take of a core, one after another.

    Attributes:
        bundles: how many the core issues.
        nbytes: bytes of the chip's memory.
        seconds: the least time, of each operation the longer one of both.
        loops: how many loops count as if they ran once, because nothing says how often they do.
    """

    bundles: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    loops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(x + y for x, y in pairs))


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step: its operations, and what they take.

    Attributes:
        text: the optimized HLO.
        codes: the bundles of its operations by name.
        busy: the share of the experts that a step reads.
        core: the cores that run it.
        chunk: what it prefills; None if it decodes.
    """

    text: str
    codes: dict[str, Code]
    busy: float
    core: Core
    chunk: Chunk | None = None

    @functools.cached_property
    def operations(self) -> list[Operation]:
        """The operations in scheduled order."""
        return entry_operations(self.text)

    @functools.cached_property
    def traffic(self) -> Traffic:
        """The bytes of the operations."""
        return Traffic(self.text, self._share)

    @functools.cached_property
    def _operands(self) -> Traffic:
        """The bytes of the operations, also those that are on chip."""
        return Traffic(self.text, self._share, on_chip=True)

    def _share(self, name: str) -> float:
        """Kernels read the experts that are chosen, and coordinates only of blocks with a mask."""
        return self.busy if "['experts']" in name else 0.0 if ".coords." in name else 1.0

    def cost(self, operations: Iterable[Operation]) -> Cost:
        """What operations take; loops and branches take what is in them, once."""
        return sum((self._cost(operation) for operation in operations), Cost())

    def _cost(self, operation: Operation) -> Cost:
        if operation.inside:
            inside = self.cost(operation.inside)
            return dataclasses.replace(inside, loops=inside.loops + 1)
        name = operation.name
        nbytes, bundles, loops = self.traffic.of(name), 0, 0
        if name in self.codes:
            bundles, loops = self._bundles(name)
        seconds = max(bundles / self.core.clock, nbytes / self.core.bandwidth)
        return Cost(bundles, nbytes, seconds, loops)

    def _bundles(self, name: str) -> tuple[int, int]:
        code = self.codes[name]
        if self.chunk is not None:
            hot = self.chunk.hot_bundles(name, code, self.traffic.operand_shapes(name))
            return bundles_around(code, hot)
        return bundles_of(name, code, self._operands.of(name), self.core)

    @property
    def seconds(self) -> dict[str, float]:
        """The times of all operations together, and between them.

        Between them the program itself starts operations and computes with scalars: of its bundles
        each counts once.
        """
        cost, between = self.cost(self.operations), whole(self.codes[TOP]).total
        clock, bandwidth = self.core.clock, self.core.bandwidth
        return {
            "operations": cost.seconds,
            "bundles": cost.bundles / clock,
            "memory": cost.nbytes / bandwidth,
            "between": between.bundles / clock,
        }

    @property
    def pool_copies(self) -> int:
        """How many operations copy all pages of keys or values, or of their scales."""
        parameters = self.traffic.parameters().items()
        pools = {size for name, size in parameters if ".layers[" in name and size >= LARGE}
        copies = (x.name for x in self.operations if x.kind in COPIES)
        return sum(bool(pools & {*self.traffic.moved(name)}) for name in copies)


def bundles_of(name: str, code: Code, nbytes: int, core: Core) -> tuple[int, int]:
    """Bundles of an operation of decoding, and how many loops count as if they ran once.

    A kernel's hot loop, whose trips only a register knows, runs as often as its bytes need. It
    counts once if only registers know the sizes of its copies too.

    Args:
        name: the operation's name.
        code: its code.
        nbytes: bytes that it reads and writes, in memory or on chip.
        core: the cores that run it.
    """
    once, hot = whole(code).run, hot_loop(code)
    copies = hot.total.copies
    if hot.trips is not None or not any(copies):
        return once.bundles, once.loops
    arrays = next((count for start, count in ARRAYS.items() if name.startswith(start)), 1)
    path = hot_paths(code, arrays * max(copies))[0]
    cores = 1 if code.on_one_core else core.cores
    trips = max(1, round(nbytes / cores / path.copied))
    return once.bundles + (trips - 1) * path.work.bundles, once.loops - 1


def bundles_around(code: Code, hot_bundles: int | None) -> tuple[int, int]:
    """Bundles of an operation of prefill, and how many loops count as if they ran once.

    Args:
        code: its code.
        hot_bundles: those of all iterations of its hot loop; None if the code alone says them.
    """
    every, hot = whole(code), hot_loop(code)
    if hot_bundles is None:
        return every.run.bundles, every.run.loops
    counted = every.entries(hot) * hot.run.bundles
    return every.run.bundles - counted + hot_bundles, every.run.loops - (hot.trips is None)


@dataclasses.dataclass(frozen=True)
class TpuStep:
    """A step of one row: a new token of decoding, or the last chunk of its prefill.

    Attributes:
        slice: the TPU slice, as `parse_target` reads it.
        mesh: how it is divided, as `MeshConfig.parse` reads it.
        context: tokens of the row, new ones included.
        model: the name of a preset.
        kv: the format of the cache.
        tokens: how many are new; more than one are a chunk of prefill.
    """

    slice: str
    mesh: str
    context: int
    model: str = "scout"
    kv: str = "int8"
    tokens: int = 1

    @property
    def name(self) -> str:
        return f"{'prefill' if self.is_prefill else 'step'}-{self.model}-{self.slice}"

    @property
    def is_prefill(self) -> bool:
        return self.tokens > 1

    @property
    def bound(self) -> str:
        """Which of the plan's bounds the step is compared with."""
        return "compute" if self.is_prefill else "memory"

    def config(self, layers: int) -> Llama4Config:
        """The model's first layers."""
        config = PRESETS[self.model]
        return dataclasses.replace(config, layers=config.layers[:layers])

    def work(self, layers: int) -> Work:
        """The step of so many layers, for the plan."""
        sizes: dict[str, Any] = {"context": self.context, "kv": self.kv}
        if self.is_prefill:
            sizes |= {"task": "prefill", "prefill_chunk": self.tokens}
        return Work(config=self.config(layers), **sizes)

    def chunk(self) -> Chunk | None:
        """What it prefills."""
        if not self.is_prefill:
            return None
        target = parse_target(self.slice)
        return Chunk(self.config(PERIOD), self.context, self.tokens, self.kv, target)

    def figures(self) -> dict[str, Any]:
        """The step's figures, each of a further layer on average."""
        core, mesh = core_of(parse_target(self.slice)), MeshConfig.parse(self.mesh)
        programs = {n: self._program(n, mesh, core) for n in (PERIOD, 2 * PERIOD)}
        before, after = programs.values()
        seconds = {kind: (after.seconds[kind] - x) / PERIOD for kind, x in before.seconds.items()}
        last = range(PERIOD, 2 * PERIOD)
        kinds = ((i, self.config(2 * PERIOD).layers[i]) for i in last)
        return {
            **dataclasses.asdict(self),
            "name": self.name,
            "bound": self.bound,
            "a_layer": marginal_operations(lambda n: programs[n].text, PERIOD),
            "pool_copies": (after.pool_copies - before.pool_copies) / PERIOD,
            "seconds": seconds | self._plan(mesh),
            "by_layer": {
                f"{kind.attention}, {kind.feed_forward}": len(of_layer(after.operations, i))
                for i, kind in kinds
            },
            "most_expensive": _most_expensive(after, last),
        }

    def _program(self, layers: int, mesh: MeshConfig, core: Core) -> Program:
        work = self.work(layers)
        text, codes = dumped(_compiled, self, layers)
        busy = busy_experts(work, mesh, device_share(work, mesh))
        return Program(text, codes, busy, core, self.chunk())

    def _plan(self, mesh: MeshConfig) -> dict[str, float]:
        """Seconds of a further layer by two of the plan's bounds: `bound`, and communication."""
        target = parse_target(self.slice)
        before, after = (
            bounds(target, demand(self.work(layers), mesh)) for layers in (PERIOD, 2 * PERIOD)
        )
        names = {"plan": self.bound, "links": "communication"}
        return {
            key: (getattr(after, name) - getattr(before, name)) / PERIOD
            for key, name in names.items()
        }


def _compiled(step: TpuStep, layers: int) -> str:
    """The optimized HLO; called in a process of its own, which compiles for TPUs only."""
    jax.config.update("jax_platforms", "cpu")
    mesh = MeshConfig.parse(step.mesh).make(absent_devices(parse_target(step.slice)))
    config, capacity = step.config(layers), round_capacity(step.context, mesh)
    sizes: dict[str, Any] = {"rows": 1, "tokens": step.tokens, "capacity": capacity}
    lowered = lower_step(config, mesh, abstract_arguments(config, mesh, **sizes, kv=step.kv))
    return lowered.compile().as_text() or ""


def _most_expensive(program: Program, layers: Iterable[int]) -> list[dict[str, Any]]:
    """The operations of these layers that take longest, those of one name and origin as one."""
    groups: dict[tuple[str, str], list[Operation]] = collections.defaultdict(list)
    layers = [*layers]
    for operation in (x for layer in layers for x in of_layer(program.operations, layer)):
        groups[_NUMBER.sub("", operation.name), operation.op].append(operation)
    found: list[dict[str, Any]] = []
    for (name, op), operations in groups.items():
        cost, source = program.cost(operations), operations[0].source
        amounts = {key: x / len(layers) for key, x in dataclasses.asdict(cost).items()}
        amounts = {"a_layer": len(operations) / len(layers), **amounts}
        found.append({"operation": name, "op": op, "source": source, **amounts})
    return sorted(found, key=lambda each: -each["seconds"])[:SHOWN]


def all_steps(kind: str) -> list[TpuStep]:
    """The steps of one generation of TPUs."""
    steps = (
        TpuStep("v5p-8", "tensor=4", 1_000_000),
        TpuStep("v5p-16", "tensor=8", 10_000_000),
        TpuStep("v5p-16", "tensor=8", 1_000_000, tokens=8192),
        TpuStep("v6e-64", "sequence=8,tensor=8", 1_000_000),
    )
    return [step for step in steps if step.slice.startswith(f"{kind}-")]
