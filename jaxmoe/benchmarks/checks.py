"""What the checks of the GPU benchmarks share: outcomes, errors and their tolerance."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from rich.table import Table

from jaxmoe.benchmarks.timing import one_line

TOLERANCE = 1e-2  # the largest error that passes, as a fraction of the largest exact value


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a check.

    Attributes:
        name: the check's name.
        errors: the largest error of each result, as of `largest_error`.
        raised: the exception in one line, if the check raised one.
    """

    name: str
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    raised: str | None = None

    @property
    def failure(self) -> str | None:
        """Why the check fails, in words; None if it passes."""
        if self.raised:
            return f"{self.name} raises {self.raised}"
        wrong = {name: x for name, x in self.errors.items() if not x <= TOLERANCE}  # or NaN
        parts = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        return f"{self.name} is off, {parts} of its largest value" if wrong else None


def outcome(check: Any, implementation: str, errors: Callable[..., dict[str, float]]) -> Outcome:
    """Runs a check on the current device.

    Args:
        check: the check; it has a `name`.
        implementation: the implementation to check.
        errors: computes the largest error of each result of (check, implementation).
    """
    try:
        return Outcome(check.name, errors(check, implementation))
    except Exception as error:  # such as a kernel that does not compile: the check fails
        return Outcome(check.name, raised=one_line(error))


def largest_errors(got: dict[str, jax.Array], want: dict[str, jax.Array]) -> dict[str, float]:
    """`largest_error` of each result, by the names in `want`."""
    return {name: largest_error(got[name], want[name]) for name in want}


def largest_error(got: jax.typing.ArrayLike, want: jax.typing.ArrayLike) -> float:
    """The largest absolute error over the largest absolute value of `want`.

    Infinite if the shapes differ, or if -inf, the log-sum-exp of no keys, is at other positions.
    """
    result, exact = np.asarray(got, np.float64), np.asarray(want, np.float64)
    empty = np.isneginf(exact)
    if result.shape != exact.shape or np.any(np.isneginf(result) != empty):
        return math.inf
    result, exact = result[~empty], exact[~empty]
    largest = np.max(np.abs(exact), initial=1e-9)
    return float(np.max(np.abs(result - exact), initial=0) / largest)


def outcomes_table(outcomes: list[Outcome]) -> Table:
    """A table of the outcomes: a row for each check, a column for each result."""
    table = Table(title=f"Largest error over the largest value; {TOLERANCE} is allowed")
    results = list(_names_of(outcomes))
    table.add_column("check")
    for name in results:
        table.add_column(name, justify="right")
    for row in outcomes:
        errors = [f"{row.errors[name]:.1e}" if name in row.errors else "" for name in results]
        table.add_row(row.name, *(errors if row.raised is None else ["raised"]))
    return table


def _names_of(outcomes: list[Outcome]) -> Iterable[str]:
    """The names of all results; at least one, whose column says that a check raised."""
    return dict.fromkeys(name for x in outcomes for name in x.errors) or ["out"]
