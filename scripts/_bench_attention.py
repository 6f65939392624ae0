"""`benchmark.py attention`: checks every kernel on this GPU, then times Llama 4's attention."""

import argparse
import dataclasses
import gc

import jax
import jax.numpy as jnp
import tables
from _attention_calls import builders, torch_with_cuda
from _attention_cases import Case, matching, random_inputs
from _attention_checks import FULL, TOY, Outcome, Size, checks_of, outcome, outcomes_table
from _bench import (
    Effort,
    first_line_of,
    git_commit,
    package_version,
    time_call,
    time_in_turn,
    today,
    versions,
    write_json,
)
from _cli import task_progress
from rich.console import Console
from rich.table import Table

from jaxmoe.errors import UserError
from pallas_kernels.mosaic import ptxas_version

KERNELS = "mosaic_gpu"
MATRIX = 8192  # side of the product that sets the ceiling of arithmetic
COPY_ELEMENTS = 2**30  # of the copy that sets the ceiling of memory: 2 GiB read, 2 GiB written
QUICK = Effort(rounds=3, seconds=0.03)


def run_attention(args: argparse.Namespace) -> None:
    """Lists, checks or measures, as the options say."""
    cases = matching(args.cases)
    if args.list:
        print("\n".join(case.name for case in cases))
    elif args.simulate:
        jax.config.update("jax_platforms", "cpu")
        _refuse_failures(_check(cases, TOY, "xla"), hint="")
    else:
        _measure(args, cases, _gpu())


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


def _measure(args: argparse.Namespace, cases: list[Case], device: jax.Device) -> None:
    """Writes what is known after every case: a run that is cut off leaves its figures."""
    figures = _header(device)
    write_json(args.output, figures)
    outcomes = _check(cases, FULL, KERNELS)
    figures["checks"] = _check_figures(outcomes)
    write_json(args.output, figures)
    if not args.force:
        _refuse_failures(outcomes, hint="; --force times them all the same")
    if args.check_only:
        return
    effort, memory = QUICK if args.quick else Effort(), device.memory_stats()["bytes_limit"]
    left_out = {case: line for case in cases if (line := case.left_out(memory))}
    figures |= {"rounds": effort.rounds, "ceilings": _ceilings(effort)}
    figures |= {"left_out": list(left_out.values()), "cases": []}
    with task_progress("Timing", len(cases) - len(left_out), "cases") as advance:
        for case in (case for case in cases if case not in left_out):
            figures["cases"].append(_case_figures(case, effort, figures["ceilings"]))
            write_json(args.output, figures)
            gc.collect()  # an error's traceback would hold a cache of many GB
            advance(1)
    _print(figures)


def _header(device: jax.Device) -> dict:
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
            "ptxas": ".".join(map(str, ptxas_version())) or None,
            "cudnn": package_version("nvidia-cudnn-cu13"),
            "torch": torch and torch.__version__,
        },
    }


def _check(cases: list[Case], size: Size, implementation: str) -> list[Outcome]:
    """Every check of the cases' families, run and printed."""
    families = dict.fromkeys(case.family for case in cases)
    checks = [check for family in families for check in checks_of(family, size)]
    outcomes = []
    with task_progress("Checking", len(checks), "checks") as advance:
        for check in checks:
            outcomes.append(outcome(check, implementation))
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


def _case_figures(case: Case, effort: Effort, ceilings: dict[str, float]) -> dict:
    """Seconds and rates by contender; null for one that cannot express the case or fails."""
    inputs = random_inputs(case)
    seconds, errors = time_in_turn(builders(case, inputs, KERNELS), effort)
    rates = {name: case.work / each / 1e12 for name, each in seconds.items()}
    ours = rates.get("jaxmoe")
    return {
        **dataclasses.asdict(case),
        "unit": case.unit,
        "work": case.work,
        "seconds": {name: seconds.get(name) for name in tables.CONTENDERS},
        "rates": {name: rates.get(name) for name in tables.CONTENDERS},
        "of_ceiling": ours and ours / ceilings[case.unit],
        "errors": errors,
    }


def _print(figures: dict) -> None:
    Console().print(attention_table(figures))
    for line in [*figures["left_out"], *tables.attention_errors(figures)]:
        print(line)


def attention_table(figures: dict) -> Table:
    """The figures as a table to print."""
    table = Table(title=f"{figures['device']}; ceilings {tables.ceilings_text(figures)}")
    for column in tables.ATTENTION_COLUMNS:
        name = column == "case"
        table.add_column(column, justify="left" if name else "right", no_wrap=name)
    for row in tables.attention_rows(figures):
        table.add_row(*row)
    return table
