"""A benchmark of kernels on a GPU: checks every kernel there, then times it beside others."""

import argparse
import dataclasses
import fnmatch
import gc
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxmoe.benchmarks import tables
from jaxmoe.benchmarks.checks import Outcome, outcome, outcomes_table
from jaxmoe.benchmarks.timing import (
    Call,
    Effort,
    first_line_of,
    git_commit,
    package_version,
    time_call,
    time_in_turn,
    today,
    torch_with_cuda,
    versions,
    write_json,
)
from jaxmoe.cli.terminal import task_progress
from jaxmoe.errors import UserError
from pallas_kernels import ptxas

KERNELS = "mosaic_gpu"
COLD_BYTES = 256e6  # read in turn where memory bounds: five times the L2 of an H100 or H200
SPARE_BYTES = 2**30  # of memory, beside what a case is known to need
MATRIX = 8192  # side of the product that sets the ceiling of arithmetic
COPY_ELEMENTS = 2**30  # of the copy that sets the ceiling of memory: 2 GiB read, 2 GiB written
QUICK = Effort(rounds=3, seconds=0.03)


@runtime_checkable
class Case(Protocol):
    """One call that is timed."""

    @property
    def name(self) -> str: ...

    @property
    def family(self) -> str:
        """Cases of one family run the same kernels, and share their checks."""
        ...

    @property
    def work(self) -> dict[str, float]:
        """What one call takes, by the unit of its rate: operations, or bytes."""
        ...

    @property
    def facts(self) -> dict:
        """What the figures say of the case."""
        ...

    def left_out(self, memory: int) -> str | None:
        """Why the case does not run on a device with so many bytes, or None."""
        ...


@dataclasses.dataclass(frozen=True)
class Suite:
    """What a benchmark is made of.

    Attributes:
        full, toy: what `checks` takes as size, on a GPU and on a CPU.
        errors: of a check by an implementation, the largest of each result.
        contenders: names of all that may be timed.
        grids: the tables of figures.
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
    """Lists, checks or measures, as the options say."""
    cases = matching(suite.cases(), args.cases)
    if args.list:
        print("\n".join(case.name for case in cases))
    elif args.simulate:
        jax.config.update("jax_platforms", "cpu")
        _refuse_failures(_check(suite, cases, suite.toy, "xla"), hint="")
    else:
        measure(suite, args, cases, _gpu())


def matching(cases: list, pattern: str) -> list:
    """The cases whose names match a shell pattern."""
    found = [case for case in cases if fnmatch.fnmatchcase(case.name, pattern)]
    if not found:
        raise UserError(f"--cases '{pattern}' matches no case; --list names them.")
    return found


def _gpu() -> jax.Device:
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
    """Writes what is known after every case: a run that is cut off leaves its figures."""
    figures = header(device)
    write_json(args.output, figures)
    outcomes = _check(suite, cases, suite.full, KERNELS)
    figures["checks"] = _check_figures(outcomes)
    write_json(args.output, figures)
    if not args.force:
        _refuse_failures(outcomes, hint="; --force times them all the same")
    if args.check_only:
        return
    effort, memory = QUICK if args.quick else Effort(), device.memory_stats()["bytes_limit"]
    left_out = {case.name: line for case in cases if (line := case.left_out(memory))}
    figures |= {"rounds": effort.rounds, "ceilings": _ceilings(effort)}
    figures |= {"left_out": list(left_out.values()), "cases": []}
    with task_progress("Timing", len(cases) - len(left_out), "cases") as advance:
        for case in (case for case in cases if case.name not in left_out):
            figures["cases"].append(case_figures(suite, case, effort, figures["ceilings"]))
            write_json(args.output, figures)
            gc.collect()  # an error's traceback would hold arrays of many GB
            advance(1)
    _print(suite, figures)


def header(device: jax.Device) -> dict:
    """When, where and with what a run is made."""
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
    """Every check of the cases' families, run and printed."""
    families = dict.fromkeys(case.family for case in cases)
    checks = [check for family in families for check in suite.checks(family, size)]
    outcomes = []
    with task_progress("Checking", len(checks), "checks") as advance:
        for check in checks:
            outcomes.append(outcome(check, implementation, suite.errors))
            advance(1)
    Console().print(outcomes_table(outcomes))
    return outcomes


def _refuse_failures(outcomes: list[Outcome], hint: str) -> None:
    failures = [each.failure for each in outcomes if each.failure]
    if failures:
        more = f", and {len(failures) - 1} more fail" if failures[1:] else ""
        raise UserError(f"{failures[0]}{more}{hint}.")


def _check_figures(outcomes: list[Outcome]) -> dict:
    passed = [error for each in outcomes if not each.failure for error in each.errors.values()]
    return {
        "run": len(outcomes),
        "failures": [each.failure for each in outcomes if each.failure],
        "largest_error_of_those_that_passed": max(passed, default=None),
    }


def _ceilings(effort: Effort) -> dict[str, float]:
    """What this device does on a large matrix product and on a large copy, by unit."""
    a, b = jax.random.normal(jax.random.key(0), (2, MATRIX, MATRIX), jnp.bfloat16)
    multiplied = time_call(jnp.dot, (a, b), effort)
    x = jax.random.bits(jax.random.key(1), (COPY_ELEMENTS,), jnp.uint16)
    copied = time_call(lambda x: ~x, (x,), effort)  # XLA might leave out a plain copy
    return {"TFLOP/s": 2 * MATRIX**3 / multiplied / 1e12, "TB/s": 2 * x.nbytes / copied / 1e12}


def case_figures(suite: Suite, case: Case, effort: Effort, ceilings: dict[str, float]) -> dict:
    """Seconds and rates by contender; null for one that cannot express the case or fails."""
    inputs = suite.inputs(case)
    seconds, errors = time_in_turn(suite.builders(case, inputs, KERNELS), effort)
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
    for grid in suite.grids(figures):
        Console().print(printed(grid, figures))
    for line in [*figures["left_out"], *tables.error_lines(figures, suite.contenders)]:
        print(line)


def printed(grid: tables.Grid, figures: dict) -> Table:
    """A table to print."""
    table = Table(title=f"{figures['device']}; ceilings {tables.ceilings_text(figures)}")
    for column in grid.columns:
        name = column == "case"
        table.add_column(column, justify="left" if name else "right", no_wrap=name)
    for row in grid.rows:
        table.add_row(*row)
    return table
