"""Chooses among the implementations of an operation at trace time."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One implementation of an operation.

    A case is a dataclass that holds what is known of a call at trace time.

    Attributes:
        name: what callers ask for it by.
        why_not: says why the implementation cannot serve a case; None if it can.
        run: the function that computes the operation, or a module of such functions.
        config_type: the dataclass of its tunable sizes.
        config: the config for a case: the tuned one if there is one, else a default.
    """

    name: str
    why_not: Callable[[Any], str | None]
    run: Any
    config_type: type
    config: Callable[[Any], Any]


def choose(
    implementations: Sequence[Implementation], case: Any, name: str | None = None
) -> Implementation:
    """The implementation called `name`, or with None the first one that serves the case.

    Args:
        implementations: fastest first; the last one serves every case.
        case: what is known of the call at trace time.
        name: the implementation that the caller asks for.

    Raises:
        ValueError: if no implementation has that name, or it does not serve the case.
    """
    if name is None:
        return next(choice for choice in implementations if choice.why_not(case) is None)
    named = {choice.name: choice for choice in implementations}
    if name not in named:
        raise ValueError(f"implementation '{name}' is unknown; there are {', '.join(named)}.")
    if reason := named[name].why_not(case):
        raise ValueError(f"implementation '{name}' does not serve this call: {reason}.")
    return named[name]


def resolve_config(implementation: Implementation, case: Any, config: Any = None) -> Any:
    """The caller's `config`, or with None the implementation's own for the case.

    Raises:
        ValueError: if `config` is the config of another implementation.
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
