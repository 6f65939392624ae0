"""Chooses the configs of the GPU kernels: compiles for a GPU, and if it is present times them."""

import argparse
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmoe.benchmarks.timing import Call, Effort, one_line, time_in_turn, today, write_json
from jaxmoe.benchmarks.tuning_problems import Problem, all_problems
from jaxmoe.errors import UserError
from jaxmoe.progress import task_progress
from pallas_kernels import ptxas
from pallas_kernels.compile.absent import absent_h100s, absent_h200s, compiler_options, lower_for
from pallas_kernels.compile.assembler import KernelReport, assembler_reports
from pallas_kernels.tuning import file_of

DEVICES = {"h100": absent_h100s, "h200": absent_h200s}


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=DEVICES, default="h100")
    parser.add_argument(
        "--output", metavar="FILE.json", help="default: the file that the kernels read"
    )
    return parser


def main() -> None:
    """Runs the command."""
    args = make_parser().parse_args()
    (device,) = DEVICES[args.device](1)
    figures = tuned(device, all_problems())
    write_json(args.output or str(file_of(device.device_kind)), figures)


def tuned(device: jax.Device, problems: list[Problem]) -> dict:
    """Chooses a config for each problem; returns the content of the file."""
    with task_progress("Compiling", sum(len(p.candidates) for p in problems), "configs") as advance:
        entries = [_entry(device, problem, advance) for problem in problems]
    return {
        "device": device.device_kind,
        "date": today(),
        "jax": jax.__version__,
        "ptxas": ".".join(map(str, ptxas.version(ptxas.select() or ""))),
        "entries": entries,
    }


def _entry(device: jax.Device, problem: Problem, advance: Callable[[int], None]) -> dict:
    registers, dropped = {}, []
    for config in problem.candidates:
        try:
            registers[config] = _registers(device, problem, config)
        except Exception as error:  # any failure to compile drops the config, and is recorded
            reason = str(error) if isinstance(error, UserError) else one_line(error)
            dropped.append({"config": dataclasses.asdict(config), "reason": reason})
        advance(1)
    if not registers:
        first = dropped[0]["reason"]
        raise UserError(f"no config of {problem.op} {problem.key} compiles, the first for: {first}")
    seconds = _seconds(device, problem, list(registers))
    best = min(seconds, key=seconds.__getitem__) if seconds else next(iter(registers))
    return {
        "op": problem.op,
        "key": problem.key,
        "config": dataclasses.asdict(best),
        "registers": registers[best],
        "chosen_by": "time" if seconds else "compiler",
        "ms": 1e3 * seconds[best] if seconds else None,
        "dropped": dropped,
    }


def _registers(device: jax.Device, problem: Problem, config) -> int:
    """The most registers per thread that a kernel of the problem takes with a config.

    Raises:
        UserError: if a kernel spills registers, or ptxas warns of anything.
    """
    lowered = lower_for(device, functools.partial(problem.call, config), *problem.arguments())
    reports = assembler_reports(lowered, compiler_options())
    faults = [fault for report in reports if (fault := _fault(report))]
    if faults:
        raise UserError(faults[0])
    return max(report.registers for report in reports)


def _fault(report: KernelReport) -> str | None:
    if report.spill_stores or report.spill_loads:
        return f"{report.name} spills {report.spill_stores} bytes"
    return report.warnings[0] if report.warnings else None


def _seconds(device: jax.Device, problem: Problem, configs: list) -> dict:
    """Median seconds of a call with each config; empty if no such device is present."""
    present = [d for d in jax.devices() if d.device_kind == device.device_kind]
    if not present:
        return {}
    arrays = *problem.coords(), *_random(problem.shapes)

    def builder(config) -> Callable[[], Call]:
        compiled = jax.jit(functools.partial(problem.call, config))
        return lambda: Call(lambda: compiled(*arrays))

    return time_in_turn({config: builder(config) for config in configs}, Effort())[0]


def _random(shapes: tuple):
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten([_random_array(*pair) for pair in zip(keys, leaves, strict=True)])


def _random_array(key: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    if like.dtype == jnp.int8:
        return jax.random.randint(key, like.shape, -127, 128, like.dtype)
    drawn = jnp.bfloat16 if like.dtype.itemsize == 1 else like.dtype
    return jax.random.normal(key, like.shape, drawn).astype(like.dtype)
