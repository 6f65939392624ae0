"""Runs a benchmark suite on a GPU: checks every kernel, then times it against other libraries."""

import argparse
import dataclasses
import fnmatch
import functools
import gc
import os
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxmoe.benchmarks import processes, tables
from jaxmoe.benchmarks.checks import Outcome, outcome, outcomes_table
from jaxmoe.benchmarks.timing import (
    Call,
    Effort,
    first_line_of,
    git_commit,
    one_line,
    package_version,
    time_call,
    time_in_turn,
    today,
    torch_with_cuda,
    versions,
    write_json,
)
from jaxmoe.errors import UserError
from jaxmoe.progress import task_progress
from pallas_kernels import ptxas

KERNELS = "mosaic_gpu"
COLD_BYTES = 256e6  # read in rotation by memory-bound cases: five times an H100's L2 cache
SPARE_BYTES = 2**30  # memory that a case may need beyond its arrays
MATRIX = 8192  # rows and columns of the matrix product that measures the peak of arithmetic
COPY_ELEMENTS = 2**30  # 16-bit elements of the copy that measures memory: 2 GiB read and written
QUICK = Effort(rounds=3, seconds=0.03)


@runtime_checkable
class Case(Protocol):
    """A call to time."""

    @property
    def name(self) -> str: ...

    @property
    def family(self) -> str:
        """The name of the kernels that the case runs; cases of a family share their checks."""
        ...

    @property
    def work(self) -> dict[str, int | float]:
        """The operations or bytes of one call, by the unit of the rate (TFLOP/s, TB/s)."""
        ...

    @property
    def facts(self) -> dict:
        """The case's fields in the file of figures."""
        ...

    @property
    def memory(self) -> int:
        """An estimate of the bytes of the device's memory that the case takes."""
        ...

    def left_out(self, memory: int) -> str | None:
        """Says why the case does not run on a device with `memory` bytes; None if it does."""
        ...


@dataclasses.dataclass(frozen=True)
class Suite:
    """The parts of a benchmark.

    Attributes:
        cases: lists the cases to time.
        checks: lists the checks of (family, size).
        full: the size of checks on a GPU.
        toy: the size of checks on a CPU.
        errors: the largest error of each result of (check, implementation).
        inputs: makes a case's arrays.
        builders: the functions that make a call to time, by contender, of (case, inputs,
            implementation).
        contenders: the title of everything that may be timed, by name.
        grids: makes the tables of the figures.
    """

    cases: Callable[[], list]
    checks: Callable[[str, Any], list]
    full: Any
    toy: Any
    errors: Callable[[Any, str], dict[str, float]]
    inputs: Callable[[Any], Any]
    builders: Callable[[Any, Any, str], dict[str, Callable[[], Call]]]
    contenders: dict[str, str]
    grids: Callable[[dict], list[tables.Grid]]


def run_suite(suite: Suite, args: argparse.Namespace) -> None:
    """Lists the cases, runs the checks, or measures, by the command line's arguments."""
    cases = matching(suite.cases(), args.cases)
    if args.list:
        print("\n".join(case.name for case in cases))
    elif args.simulate:
        jax.config.update("jax_platforms", "cpu")
        _refuse_failures(_check(suite, cases, suite.toy, "xla"), hint="")
    else:
        measure(suite, args, cases, _gpu())


def matching(cases: list, patterns: list[str]) -> list:
    """The cases whose names match one of several shell patterns.

    Raises:
        UserError: if a pattern matches none.
    """
    names = [case.name for case in cases]
    matched = {pattern: set(fnmatch.filter(names, pattern)) for pattern in patterns}
    for pattern, found in matched.items():
        if not found:
            raise UserError(f"--cases '{pattern}' matches no case; --list names them.")
    return [case for case in cases if case.name in set.union(*matched.values())]


def _processes() -> int:
    """How many processes use a GPU at once; without one, all runs in this process."""
    return min(processes.MOST, os.cpu_count() or 1) if jax.default_backend() == "gpu" else 1


def _gpu() -> jax.Device:
    processes.share_memory()
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        raise UserError("no GPU: JAX finds no device at all.") from error
    if device.platform != "gpu":
        raise UserError(
            f"no GPU: JAX finds {device.device_kind} only; --simulate runs the checks without one."
        )
    return device


def measure(suite: Suite, args: argparse.Namespace, cases: list, device: jax.Device) -> None:
    """Checks and times the cases, and prints the figures.

    The file of figures is rewritten after every case, so that an aborted run leaves what it
    measured.
    """
    figures = header(device)
    write_json(args.output, figures)
    if not args.time_only:
        outcomes = _check(suite, cases, suite.full, KERNELS)
        figures["checks"] = _check_figures(outcomes)
        write_json(args.output, figures)
        if not args.force:
            _refuse_failures(outcomes, hint="; --force times them all the same")
    if args.check_only:
        return
    effort, memory = QUICK if args.quick else Effort(), device.memory_stats()["bytes_limit"]
    left_out = {case.name: line for case in cases if (line := case.left_out(memory))}
    (ceilings,) = processes.run_each(_ceilings, [effort], min(2, _processes()))
    figures |= {"rounds": effort.rounds, "ceilings": ceilings}
    figures |= {"left_out": list(left_out.values()), "cases": []}
    cases = [case for case in cases if case.name not in left_out]
    run = functools.partial(case_figures, suite, effort=effort, ceilings=figures["ceilings"])
    with task_progress("Timing", len(cases), "cases") as advance:
        sizes = [case.memory for case in cases]
        for timed in processes.run_in_turn(run, cases, sizes, memory, _processes()):
            figures["cases"].append(timed)
            write_json(args.output, figures)
            advance(1)
    _print(suite, figures)


def header(device: jax.Device) -> dict:
    """The date, device, commit and versions of a run."""
    torch = torch_with_cuda()
    driver = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    return {
        "date": today(),
        "device": device.device_kind,
        "commit": git_commit(),
        "versions": versions()
        | {
            "driver": first_line_of(*driver),
            "cuda": " ".join(device.client.platform_version.split()),
            "ptxas": ".".join(map(str, ptxas.version(ptxas.select() or ""))) or None,
            "cudnn": package_version("nvidia-cudnn-cu13"),
            "torch": torch and torch.__version__,
            "transformers": package_version("transformers"),
        },
    }


def _check(suite: Suite, cases: list, size: Any, implementation: str) -> list[Outcome]:
    """Runs every check of the cases' families, and prints a table of the outcomes."""
    families = dict.fromkeys(case.family for case in cases)
    checks = [check for family in families for check in suite.checks(family, size)]
    run = functools.partial(outcome, implementation=implementation, errors=suite.errors)
    outcomes = []
    with task_progress("Checking", len(checks), "checks") as advance:
        for each in processes.run_each(run, checks, _processes()):
            outcomes.append(each)
            advance(1)
    Console().print(outcomes_table(outcomes))
    return outcomes


def _refuse_failures(outcomes: list[Outcome], hint: str) -> None:
    failures = [x.failure for x in outcomes if x.failure]
    if failures:
        more = f", and {len(failures) - 1} more fail" if failures[1:] else ""
        raise UserError(f"{failures[0]}{more}{hint}.")


def _check_figures(outcomes: list[Outcome]) -> dict:
    passed = [error for x in outcomes if not x.failure for error in x.errors.values()]
    return {
        "run": len(outcomes),
        "failures": [x.failure for x in outcomes if x.failure],
        "largest_error_of_those_that_passed": max(passed, default=None),
    }


def _ceilings(effort: Effort) -> dict[str, float]:
    """The rates that the device reaches in a large matrix product and a large copy, by unit."""
    a, b = jax.random.normal(jax.random.key(0), (2, MATRIX, MATRIX), jnp.bfloat16)
    multiplied = time_call(jnp.dot, (a, b), effort)
    x = jax.random.bits(jax.random.key(1), (COPY_ELEMENTS,), jnp.uint16)
    copied = time_call(lambda x: ~x, (x,), effort)  # a plain copy could be optimized away
    return {"TFLOP/s": 2 * MATRIX**3 / multiplied / 1e12, "TB/s": 2 * x.nbytes / copied / 1e12}


def case_figures(suite: Suite, case: Case, effort: Effort, ceilings: dict[str, float]) -> dict:
    """Times a case; seconds and rates by contender, None for one that cannot run it or fails."""
    gc.collect()  # frees the arrays that the traceback of an error in the last case refers to
    try:
        builders = suite.builders(case, suite.inputs(case), KERNELS)
    except Exception as error:  # such as arrays that do not fit: other cases go on
        seconds, errors = {}, dict.fromkeys(suite.contenders, one_line(error))
        with processes.alone():
            pass
    else:
        seconds, errors = time_in_turn(builders, effort, processes.alone())
    least = max(amount / ceilings[unit] / 1e12 for unit, amount in case.work.items())
    ours = seconds.get("jaxmoe")
    return {
        **case.facts,
        "work": case.work,
        "seconds": {name: seconds.get(name) for name in suite.contenders},
        "rates": {name: _rates(case, seconds.get(name)) for name in suite.contenders},
        "of_ceiling": ours and least / ours,
        "errors": errors,
    }


def _rates(case: Case, seconds: float | None) -> dict[str, float] | None:
    if seconds is None:
        return None
    return {unit: amount / seconds / 1e12 for unit, amount in case.work.items()}


def _print(suite: Suite, figures: dict) -> None:
    title = f"{figures['device']}; ceilings {tables.ceilings_text(figures)}"
    for grid in suite.grids(figures):
        Console().print(tables.for_terminal(grid, title))
    for line in [*figures["left_out"], *tables.error_lines(figures, suite.contenders)]:
        print(line)
