"""What the benchmarks share: timing of calls in rotation, and the versions of a run."""

import contextlib
import dataclasses
import datetime
import functools
import importlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jaxlib

from jaxmoe.errors import UserError
from jaxmoe.files import outputs

ROOT = Path(__file__).parents[2]
SLOW_SECONDS = 1.0  # a call that takes longer is timed once


@dataclasses.dataclass(frozen=True)
class Call:
    """Asynchronous work on a device.

    Attributes:
        start: begins the work and returns a result that may not be ready.
        wait: waits until such a result is ready.
        count: how many times one start does the work to time.
    """

    start: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to time.

    Attributes:
        rounds: how many samples are taken of each call.
        seconds: how long one sample takes.
    """

    rounds: int = 7
    seconds: float = 0.1


def time_call(function: Callable, args: tuple, effort: Effort) -> float:
    """Median seconds of a jitted function of arrays."""
    compiled = jax.jit(function)
    seconds, errors = time_in_turn({"": lambda: Call(lambda: compiled(*args))}, effort)
    if errors:
        raise UserError(f"timing failed: {errors['']}")
    return seconds[""]


def time_in_turn[Name](
    builders: dict[Name, Callable[[], Call]],
    effort: Effort,
    alone: contextlib.AbstractContextManager | None = None,
) -> tuple[dict[Name, float], dict[Name, str]]:
    """Times several calls in rotation, so that drifts of the device affect all alike.

    Args:
        builders: make the calls, by name.
        effort: how long to time.
        alone: entered when all calls are compiled, and left when they are timed.

    Returns:
        The median seconds of each call, and for calls that raised the error in one line.
    """
    calls, times, starts, errors = {}, {}, {}, {}

    def guarded(name: Name, step: Callable[[Name], None]) -> None:
        try:
            if name not in errors:
                step(name)
        except Exception as error:  # another library's failure is recorded and ends nothing
            errors[name] = one_line(error)

    def prepare(name: Name) -> None:
        calls[name] = builders[name]()
        _sample(calls[name], 1)  # compiles

    def first(name: Name) -> None:
        once = _sample(calls[name], 1)
        times[name] = [once] if once * calls[name].count > SLOW_SECONDS else []
        starts[name] = max(1, int(effort.seconds / (once * calls[name].count)))

    def again(name: Name) -> None:
        times[name].append(_sample(calls[name], starts[name]))

    for name in builders:
        guarded(name, prepare)
    with alone or contextlib.nullcontext():
        for name in builders:
            guarded(name, first)
        unhurried = [name for name in times if not times[name]]
        for _ in range(effort.rounds):
            for name in unhurried:
                guarded(name, again)
    return {name: statistics.median(times[name]) for name in times if name not in errors}, errors


def _sample(call: Call, starts: int) -> float:
    """Seconds of the work, as the mean over a number of starts with one wait at the end."""
    begin, result = time.perf_counter(), None
    for _ in range(starts):
        result = call.start()
    call.wait(result)
    return (time.perf_counter() - begin) / (starts * call.count)


def one_line(error: Exception) -> str:
    """An exception's type and the first line of its message, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def today() -> str:
    """Today's date in ISO 8601 format."""
    return datetime.date.today().isoformat()


def versions() -> dict[str, str]:
    """The versions of Python, jax and jaxlib."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


def first_line_of(*command: str) -> str | None:
    """The first line that a command prints; None if it fails or does not exist."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def package_version(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def torch_with_cuda():
    """The module `torch`; None if it cannot be imported or sees no GPU."""
    try:
        torch = importlib.import_module("torch")
    except Exception:  # not installed, or built for another CUDA than the installed one
        return None
    return torch if torch.cuda.is_available() else None


def git_commit() -> str | None:
    """The checked-out commit, with "-dirty" if files differ from it; None outside a checkout."""
    if not (ROOT / ".git").exists():  # an installed package may be inside another repository
        return None
    return first_line_of("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def write_json(path: str | None, figures: dict) -> None:
    """Writes the figures to a JSON file; does nothing if `path` is None."""
    if path is not None:
        outputs.write_json(path, figures)
