"""Tests that take several seconds have the mark `slow`: `make test-slow` runs them."""

from collections.abc import Iterable

import pytest


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
