"""`benchmark.py moe`: Llama 4's mixture of experts, checked and timed on a GPU."""

import argparse

import tables
from _bench_gpu import Suite, run_suite
from _moe_calls import builders
from _moe_cases import all_cases
from _moe_checks import FULL, TOY, checks_of, errors
from _moe_inputs import random_inputs

SUITE = Suite(
    cases=all_cases,
    checks=checks_of,
    full=FULL,
    toy=TOY,
    errors=errors,
    inputs=random_inputs,
    builders=builders,
    contenders=tables.MOE_CONTENDERS | tables.LONGEST,
    grids=lambda figures: [tables.moe_grid(figures), tables.skew_grid(figures)],
)


def run_moe(args: argparse.Namespace) -> None:
    """As the options say."""
    run_suite(SUITE, args)
