"""Analyzes the bundles of kernels and steps that are compiled for an absent TPU."""

import dataclasses
import re
from typing import Any

import jax

from jaxmoe.benchmarks.schedule import tpu_cases, tpu_steps
from jaxmoe.benchmarks.schedule.tpu_cases import TpuCase
from jaxmoe.benchmarks.schedule.tpu_steps import TpuStep, core_of
from jaxmoe.benchmarks.timing import one_line, package_version
from jaxmoe.plan.targets import Target, absent_devices
from pallas_kernels.compile.absent import lower_for, mesh_of
from pallas_kernels.compile.bundles import Code
from pallas_kernels.compile.paths import whole
from pallas_kernels.compile.tpu_dump import dumped
from pallas_kernels.compile.tpu_schedule import Core, HotPath, hot_paths

_KERNEL = re.compile(r'^ +(?:ROOT )?%(\S+) = .* custom_call_target="tpu_custom_call"', re.M)


def all_cases(target: Target) -> list[TpuCase | TpuStep]:
    """The kernels and the steps that are analyzed for a generation of TPUs."""
    kind, _, _ = str(target.compiler).partition(":")
    mesh = mesh_of(absent_devices(target)[0])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # whose sizes the cases take
        return [*tpu_cases.all_cases(), *tpu_steps.all_steps(kind)]


def header(target: Target) -> dict[str, Any]:
    """What the figures of a run say of its tools and its cores."""
    versions = {"libtpu": package_version("libtpu")}
    return {"versions": versions, "core": dataclasses.asdict(core_of(target))}


def figures(target: Target, case: TpuCase | TpuStep) -> dict[str, Any]:
    """Compiles a case; returns the figures of its kernel or of the step, or why there are none."""
    if isinstance(case, TpuStep):
        try:
            return case.figures()
        except Exception as error:  # a failure is recorded, and the other cases go on
            return {"name": case.name, "error": one_line(error)}
    facts = {"name": case.name, "kernel": case.kernel, "by": case.by, "block": case.block}
    try:
        text, codes = dumped(_compiled, target, case)
        code = max((codes[name] for name in _KERNEL.findall(text)), key=_products)
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


def _products(code: Code) -> int:
    return whole(code).total.products


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
        "copies": {"count": len(work.copies), "started": work.started, "waited": work.waited},
        "loops_counted_once": work.loops,
        "read_rate": path.per_second(core, useful),
        "product_rate": path.per_second(core, case.flops),
        "bundles": path.addresses,
    }
