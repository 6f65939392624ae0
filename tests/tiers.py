"""Tests that take several seconds have the mark `slow`: `make test-slow` runs them.

`JAXMOE_WORKLOADS=10` runs ten times as many random workloads, on more meshes.
"""

import os
from collections.abc import Iterable

import pytest

TIMES = int(os.environ.get("JAXMOE_WORKLOADS", "1"))


def with_more_workloads(*cases) -> list:
    """Cases of a parametrized test that run if more random workloads than `.ci/run`'s do."""
    return list(cases) if TIMES > 1 else []


def slow(*cases) -> list:
    """Cases of a parametrized test that only `make test-slow` runs."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


def slow_after_first(cases: Iterable) -> list:
    """Cases of which `make test` runs the first, and `make test-slow` the others."""
    first, *others = cases
    return [first, *slow(*others)]
