"""`jaxmoe benchmark schedule`: analyzes kernels and steps, compiled for an absent GPU or TPU."""

import argparse
from collections.abc import Set
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxmoe.benchmarks import tables
from jaxmoe.benchmarks.gpu import matching
from jaxmoe.benchmarks.schedule import gpu, tpu
from jaxmoe.benchmarks.schedule.cases import Case
from jaxmoe.benchmarks.timing import git_commit, today, versions, write_json
from jaxmoe.errors import UserError
from jaxmoe.parsing import read_json
from jaxmoe.plan.targets import Target, parse_target
from jaxmoe.progress import task_progress

TARGETS = {"h100": "h100x1", "h200": "h200x1", "v5p": "v5p-8", "v6e": "v6e-4"}
WIDTH = 136  # the least width of the printed tables, in characters


def add_parser(commands) -> None:
    """Adds the subcommand and its flags."""
    parser = commands.add_parser(
        "schedule", help="what bounds each kernel by its machine code, and JAX's; needs no device"
    )
    parser.set_defaults(start=run_schedule)
    parser.add_argument("--target", default="h100", help=" or ".join(TARGETS))
    parser.add_argument("--output", metavar="FILE.json", help="where to write the figures")
    parser.add_argument(
        "--cases",
        metavar="PATTERN",
        nargs="+",
        default=["*"],
        help="such as 'flash-*'; what the output has of others is kept",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases")


def run_schedule(args: argparse.Namespace) -> None:
    """Compiles the cases, prints the figures, and writes them after every case."""
    jax.config.update("jax_platforms", "cpu")
    target = _target(args.target)
    chosen = matching(suite_of(target).all_cases(target), args.cases)
    if args.list:
        print("\n".join(case.name for case in chosen))
        return
    figures = schedule(target, chosen, args.output)
    console = Console()
    console.width = max(console.width, WIDTH)
    for grid in tables.schedule_grids(figures):
        if grid.rows:
            console.print(_table(grid))
    console.print(*tables.schedule_errors(figures), sep="\n")


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise UserError(
            f"--target {name} is not served: schedule reads the machine code for "
            f"{', '.join(TARGETS)}, and that of no other target yet."
        )
    return parse_target(TARGETS[name])


def suite_of(target: Target) -> ModuleType:
    """The module that has the cases of a target, and compiles and analyzes them."""
    return tpu if target.is_tpu else gpu


def schedule(target: Target, chosen: list, output: str | None) -> dict[str, Any]:
    """Compiles and analyzes the cases; returns the content of the file of figures.

    Args:
        target: the device to compile for.
        chosen: cases and steps.
        output: the file that is rewritten after every case, or None. What it has of other cases
            is kept.
    """
    suite = suite_of(target)
    places = {case.name: place for place, case in enumerate(suite.all_cases(target))}
    others = places.keys() - {case.name for case in chosen}
    header = _header(target, suite)
    figures = header | _kept(output, others, header["versions"])
    with task_progress("Compiling", len(chosen), "cases") as advance:
        for case in chosen:
            section = "kernels" if isinstance(case, Case) else "steps"
            figures[section].append(suite.figures(target, case))
            figures[section].sort(key=lambda row: places.get(row["name"], len(places)))
            write_json(output, figures)
            advance(1)
    return figures


def _kept(output: str | None, names: Set[str], versions: dict) -> dict[str, list]:
    """The rows of these names that a file of figures has, by section.

    Raises:
        UserError: if there are any and they are of other versions.
    """
    rows: dict[str, list] = {"kernels": [], "steps": []}
    if output is None or not Path(output).exists():
        return rows
    old = read_json(output)
    rows = {section: [row for row in old[section] if row["name"] in names] for section in rows}
    if any(rows.values()) and old["versions"] != versions:
        raise UserError(
            f"{output} has figures of other versions, {old['versions']}: analyze all cases, or "
            "name another --output."
        )
    return rows


def _header(target: Target, suite: ModuleType) -> dict[str, Any]:
    of_suite = suite.header(target)
    return {
        "static": "from the compiler's output, not a measurement",
        "date": today(),
        "target": str(target.compiler).partition(":")[0],
        "commit": git_commit(),
        **of_suite,
        "versions": versions() | of_suite["versions"],
    }


def _table(grid: tables.Grid) -> Table:
    table = Table(*grid.columns, title="static: from the compiler's output, not a measurement")
    for row in grid.rows:
        table.add_row(*row)
    return table
