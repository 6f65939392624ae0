"""`jaxmoe benchmark moe`: Llama 4's mixture of experts, checked and timed on a GPU."""

import argparse

from jaxmoe.benchmarks import tables
from jaxmoe.benchmarks.gpu import Suite, run_suite
from jaxmoe.benchmarks.moe.calls import builders
from jaxmoe.benchmarks.moe.cases import all_cases
from jaxmoe.benchmarks.moe.checks import FULL, TOY, checks_of, errors
from jaxmoe.benchmarks.moe.inputs import random_inputs


def _grids(figures: dict) -> list[tables.Grid]:
    return [tables.moe_grid(figures), tables.skew_grid(figures)]


SUITE = Suite(
    cases=all_cases,
    checks=checks_of,
    full=FULL,
    toy=TOY,
    errors=errors,
    inputs=random_inputs,
    builders=builders,
    contenders=tables.MOE_CONTENDERS | tables.LONGEST,
    grids=_grids,
)


def run_moe(args: argparse.Namespace) -> None:
    """Runs the benchmark by the command line's arguments."""
    run_suite(SUITE, args)
