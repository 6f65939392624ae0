"""What the checks of the GPU benchmarks share: their outcomes, and how a result may be off."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from rich.table import Table

from jaxmoe.benchmarks.timing import one_line

TOLERANCE = 1e-2  # of the largest value


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of a check: the largest error of each result, or what it raised."""

    name: str
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    raised: str | None = None

    @property
    def failure(self) -> str | None:
        """What is wrong, or None."""
        if self.raised:
            return f"{self.name} raises {self.raised}"
        wrong = {name: x for name, x in self.errors.items() if not x <= TOLERANCE}  # NaN is wrong
        found = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        return f"{self.name} is off, {found} of its largest value" if wrong else None


def outcome(check: Any, implementation: str, errors: Callable[..., dict[str, float]]) -> Outcome:
    """Runs a check, which has a name, on the current device."""
    try:
        return Outcome(check.name, errors(check, implementation))
    except Exception as error:  # a kernel that does not compile fails its check like any other
        return Outcome(check.name, raised=one_line(error))


def largest_errors(got: dict[str, jax.Array], want: dict[str, jax.Array]) -> dict[str, float]:
    """Of each result that is wanted."""
    return {name: largest_error(got[name], want[name]) for name in want}


def largest_error(got: jax.typing.ArrayLike, want: jax.typing.ArrayLike) -> float:
    """Largest error over the largest value; infinite where -inf is not where it should be."""
    found, exact = np.asarray(got, np.float64), np.asarray(want, np.float64)
    nothing = np.isneginf(exact)
    if found.shape != exact.shape or np.any(np.isneginf(found) != nothing):
        return math.inf
    found, exact = found[~nothing], exact[~nothing]
    largest = np.max(np.abs(exact), initial=1e-9)
    return float(np.max(np.abs(found - exact), initial=0) / largest)


def outcomes_table(outcomes: list[Outcome]) -> Table:
    """The largest errors, to print."""
    table = Table(title=f"Largest error over the largest value; {TOLERANCE} is allowed")
    results = list(_names_of(outcomes))
    table.add_column("check")
    for name in results:
        table.add_column(name, justify="right")
    for each in outcomes:
        errors = [f"{each.errors[name]:.1e}" if name in each.errors else "" for name in results]
        table.add_row(each.name, *(errors if each.raised is None else ["raised"]))
    return table


def _names_of(outcomes: list[Outcome]) -> Iterable[str]:
    """Of all results; one column at least, for what is raised."""
    return dict.fromkeys(name for each in outcomes for name in each.errors) or ["out"]
