"""Analyzes the bundles of kernels that are compiled for an absent TPU."""

import dataclasses
import functools
import re
from typing import Any

import jax

from jaxmoe.benchmarks.schedule.tpu_cases import TpuCase
from jaxmoe.benchmarks.timing import one_line, package_version
from jaxmoe.plan.targets import Target, absent_devices
from pallas_kernels.compile.absent import lower_for
from pallas_kernels.compile.tpu_dump import dumped
from pallas_kernels.compile.tpu_schedule import Core, HotPath, hot_paths

_KERNEL = re.compile(r'^ +(?:ROOT )?%(\S+) = .* custom_call_target="tpu_custom_call"', re.M)


def header(target: Target) -> dict[str, Any]:
    """What the figures of a run say of its tools and its cores."""
    versions = {"libtpu": package_version("libtpu")}
    return {"versions": versions, "core": dataclasses.asdict(core_of(target))}


@functools.cache
def core_of(target: Target) -> Core:
    """The cores of a TPU, by the figures that the plan has of it."""
    kind, _, _ = str(target.compiler).partition(":")
    cores = absent_devices(target)[0].num_cores
    return Core.of(kind, cores, target.flops, target.bandwidth)


def kernel_figures(target: Target, case: TpuCase) -> dict[str, Any]:
    """Compiles a case; returns the figures of its kernel, or why there are none."""
    facts = {"name": case.name, "kernel": case.kernel, "by": case.by, "block": case.block}
    try:
        text, codes = dumped(_compiled, target, case)
        code = codes[kernel_names(text)[-1]]
        paths = hot_paths(code, case.copied, case.flops)
    except Exception as error:  # a failure is recorded, and the other cases go on
        return facts | {"error": one_line(error)}
    paths = [_path(path, core_of(target), case) for path in paths]
    return facts | {"one_core": code.on_one_core, "units": code.units, "paths": paths}


def _compiled(target: Target, case: TpuCase) -> str:
    """The optimized HLO; called in a process of its own, which compiles for TPUs only."""
    jax.config.update("jax_platforms", "cpu")
    device = absent_devices(target)[0]
    return lower_for(device, case.function, *case.shapes).compile().as_text() or ""


def kernel_names(text: str) -> list[str]:
    """The HLO instructions that are Pallas kernels, in the order of the text."""
    return _KERNEL.findall(text)


def _path(path: HotPath, core: Core, case: TpuCase) -> dict[str, Any]:
    cycles, work = path.cycles(core), path.work
    useful = case.copied if case.useful is None else case.useful
    return {
        "name": path.name and case.dearest,
        "cycles": cycles,
        "bound_by": max(cycles, key=cycles.__getitem__),
        "units": {unit: round(count, 1) for unit, count in path.units.items()},
        "busiest": max(path.units, key=path.units.__getitem__),
        "spills": path.spills,
        "copies": {"count": work.copies, "started": work.started, "waited": work.waited},
        "loops_counted_once": work.loops,
        "read_rate": path.per_second(core, useful),
        "product_rate": path.per_second(core, case.flops),
        "bundles": path.addresses,
    }
