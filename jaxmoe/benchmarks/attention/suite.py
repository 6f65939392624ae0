"""`jaxmoe benchmark attention`: Llama 4's attention, checked and timed on a GPU."""

import argparse

from jaxmoe.benchmarks import tables
from jaxmoe.benchmarks.attention.calls import builders
from jaxmoe.benchmarks.attention.cases import all_cases, random_inputs
from jaxmoe.benchmarks.attention.checks import FULL, TOY, checks_of, errors
from jaxmoe.benchmarks.gpu import Suite, run_suite


def _grids(figures: dict) -> list[tables.Grid]:
    return [tables.attention_grid(figures)]


SUITE = Suite(
    cases=all_cases,
    checks=checks_of,
    full=FULL,
    toy=TOY,
    errors=errors,
    inputs=random_inputs,
    builders=builders,
    contenders=tables.ATTENTION_CONTENDERS,
    grids=_grids,
)


def run_attention(args: argparse.Namespace) -> None:
    """Runs the benchmark by the command line's arguments."""
    run_suite(SUITE, args)
