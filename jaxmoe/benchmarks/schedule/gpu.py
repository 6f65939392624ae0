"""Analyzes the machine code of kernels and steps that are compiled for absent NVIDIA GPUs."""

import dataclasses
import functools
from typing import Any

from jaxmoe.benchmarks.schedule import cases, steps
from jaxmoe.benchmarks.schedule.cases import Case
from jaxmoe.benchmarks.schedule.steps import Step
from jaxmoe.benchmarks.timing import one_line, package_version
from jaxmoe.plan.targets import Target, absent_devices
from pallas_kernels import ptxas
from pallas_kernels.compile.absent import compiler_options, lower_for
from pallas_kernels.compile.assembler import KernelReport, assembler_reports, require_disassembler
from pallas_kernels.compile.schedule import HotLoop, Processor, hot_loops


def all_cases(target: Target) -> list[Case | Step]:
    """The kernels and the steps that are analyzed, the same for all GPUs."""
    return [*cases.all_cases(), *steps.all_steps()]


def header(target: Target) -> dict[str, Any]:
    """What the figures of a run say of its tools and its processor."""
    require_disassembler()
    tools = {
        "ptxas": ".".join(map(str, ptxas.version(ptxas.select() or ""))) or None,
        "nvdisasm": package_version("nvidia-cuda-nvdisasm"),
    }
    return {"versions": tools, "processor": dataclasses.asdict(_device(target)[1])}


def figures(target: Target, case: Case | Step) -> dict[str, Any]:
    """Compiles a case; returns the figures of the step or of its kernel, or why there are none."""
    if isinstance(case, Step):
        return case.figures(target)
    device, processor = _device(target)
    facts = {"name": case.name, "kernel": case.kernel, "by": case.by}
    try:
        lowered = lower_for(device, case.function, *case.shapes)
        reports = assembler_reports(lowered, compiler_options(), disassemble=True)
        report = _last_with_products(reports)
        loops = hot_loops(report, case.element)
    except Exception as error:  # a failure is recorded, and the other cases go on
        return facts | {"error": one_line(error)}
    return facts | _assembled(report) | {"loops": [_loop(loop, processor) for loop in loops]}


@functools.cache
def _device(target: Target) -> tuple[Any, Processor]:
    (device,) = absent_devices(target)
    return device, Processor.of(device.core_count, target.flops, target.bandwidth)


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
