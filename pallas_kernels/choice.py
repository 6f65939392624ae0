"""Choosing among the implementations of one operation, at trace time."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation."""

    name: str
    why_not: Callable[[Any], str | None]  # given a case: why it cannot serve it, or None
    run: Any  # the function, or a module of the functions, that compute it
    config_type: type
    config: Callable[[Any], Any]  # given a case: the config tuned for it, or a sensible one


def choose(
    implementations: Sequence[Implementation], case: Any, name: str | None = None
) -> Implementation:
    """The implementation called `name`, or the first that serves the case.

    Args:
        implementations: fastest first; the last one serves every case.

    Raises:
        ValueError: if there is none of that name, or it does not serve the case.
    """
    if name is None:
        return next(each for each in implementations if each.why_not(case) is None)
    named = {each.name: each for each in implementations}
    if name not in named:
        raise ValueError(f"implementation '{name}' is unknown; there are {', '.join(named)}.")
    if reason := named[name].why_not(case):
        raise ValueError(f"implementation '{name}' does not serve this call: {reason}.")
    return named[name]


def resolve_config(implementation: Implementation, case: Any, config: Any = None) -> Any:
    """The caller's config, checked, or the one tuned for the case.

    Raises:
        ValueError: if `config` belongs to another implementation.
    """
    if config is None:
        return implementation.config(case)
    wanted = implementation.config_type
    if not isinstance(config, wanted):
        raise ValueError(
            f"config {config} is not for implementation '{implementation.name}', which takes "
            f"{wanted.__module__}.{wanted.__name__}."
        )
    return config
