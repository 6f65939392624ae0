"""`jaxmoe benchmark schedule`: analyzes kernels and steps that are compiled for an absent GPU."""

import argparse
import dataclasses
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxmoe.benchmarks import tables
from jaxmoe.benchmarks.gpu import matching
from jaxmoe.benchmarks.schedule.cases import Case, all_cases
from jaxmoe.benchmarks.schedule.steps import Step, all_steps
from jaxmoe.benchmarks.timing import (
    git_commit,
    one_line,
    package_version,
    today,
    versions,
    write_json,
)
from jaxmoe.errors import UserError
from jaxmoe.plan.targets import Target, absent_devices, parse_target
from jaxmoe.progress import task_progress
from pallas_kernels import ptxas
from pallas_kernels.compile.absent import compiler_options, lower_for
from pallas_kernels.compile.assembler import KernelReport, assembler_reports, require_disassembler
from pallas_kernels.compile.schedule import HotLoop, Processor, hot_loops

TARGETS = ("h100", "h200")
WIDTH = 136  # the least width of the printed tables, in characters


def add_parser(commands) -> None:
    """Adds the subcommand and its flags."""
    parser = commands.add_parser(
        "schedule", help="what bounds each kernel by its machine code, and JAX's; needs no GPU"
    )
    parser.set_defaults(start=run_schedule)
    parser.add_argument("--target", default="h100", help=" or ".join(TARGETS))
    parser.add_argument("--output", metavar="FILE.json", help="where to write the figures")
    parser.add_argument(
        "--cases", metavar="PATTERN", nargs="+", default=["*"], help="such as 'flash-*'"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases")


def run_schedule(args: argparse.Namespace) -> None:
    """Compiles the cases, prints the figures, and writes them after every case."""
    jax.config.update("jax_platforms", "cpu")
    cases = matching([*all_cases(), *all_steps()], args.cases)
    if args.list:
        print("\n".join(case.name for case in cases))
        return
    figures = schedule(_target(args.target), cases, args.output)
    console = Console()
    console.width = max(console.width, WIDTH)
    for grid in (tables.schedule_grid(figures), tables.steps_grid(figures)):
        if grid.rows:
            console.print(_table(grid))
    console.print(
        *(f"{x['name']}: {x['error']}" for x in figures["kernels"] if "error" in x), sep="\n"
    )


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise UserError(
            f"--target {name} is not served: schedule reads NVIDIA's machine code for "
            f"{' and '.join(TARGETS)}, and that of no other target yet."
        )
    return parse_target(f"{name}x1")


def schedule(target: Target, cases: list, output: str | None) -> dict[str, Any]:
    """Compiles and analyzes the cases; returns the content of the file of figures.

    Args:
        target: the GPU to compile for.
        cases: cases and steps.
        output: the file that is rewritten after every case, or None.
    """
    require_disassembler()
    (device,) = absent_devices(target)
    processor = Processor.of(device.core_count, target.flops, target.bandwidth)
    figures = _header(target, processor) | {"kernels": [], "steps": []}
    with task_progress("Compiling", len(cases), "cases") as advance:
        for case in cases:
            if isinstance(case, Step):
                figures["steps"].append(case.figures(target))
            else:
                figures["kernels"].append(_kernel(device, processor, case))
            write_json(output, figures)
            advance(1)
    return figures


def _header(target: Target, processor: Processor) -> dict[str, Any]:
    tools = {
        "ptxas": ".".join(map(str, ptxas.version(ptxas.select() or ""))) or None,
        "nvdisasm": package_version("nvidia-cuda-nvdisasm"),
    }
    return {
        "static": "from the compiler's output, not a measurement",
        "date": today(),
        "target": target.compiler,
        "commit": git_commit(),
        "versions": versions() | tools,
        "processor": dataclasses.asdict(processor),
    }


def _kernel(device, processor: Processor, case: Case) -> dict[str, Any]:
    facts = {"name": case.name, "kernel": case.kernel, "by": case.by}
    try:
        lowered = lower_for(device, case.function, *case.shapes)
        reports = assembler_reports(lowered, compiler_options(), disassemble=True)
        report = _last_with_products(reports)
        loops = hot_loops(report, case.element)
    except Exception as error:  # a failure is recorded, and the other cases go on
        return facts | {"error": one_line(error)}
    return facts | _assembled(report) | {"loops": [_loop(loop, processor) for loop in loops]}


def _last_with_products(reports: list[KernelReport]) -> KernelReport:
    """The last kernel with tensor-core products; kernels after it may only merge results."""
    return [report for report in reports if report.wgmma][-1]


def _assembled(report: KernelReport) -> dict[str, Any]:
    fields = "registers", "spill_stores", "spill_loads"
    return {name: getattr(report, name) for name in fields} | {"warnings": [*report.warnings]}


def _loop(loop: HotLoop, processor: Processor) -> dict[str, Any]:
    cycles = loop.cycles(processor)
    return {
        "name": loop.name,
        "counts": loop.counts,
        "cycles": cycles,
        "bound_by": max(cycles, key=cycles.__getitem__),
        "read_rate": loop.read_rate(processor),
        "mufu_under_products": loop.mufu_under_products,
        "between_waits": loop.between_waits,
    }


def _table(grid: tables.Grid) -> Table:
    table = Table(*grid.columns, title="static: from the compiler's output, not a measurement")
    for row in grid.rows:
        table.add_row(*row)
    return table
