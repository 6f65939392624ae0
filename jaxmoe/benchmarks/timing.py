"""What the benchmarks share: timing in turn, and where and with what a run was made."""

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

from jaxmoe import outputs
from jaxmoe.errors import UserError

ROOT = Path(__file__).parents[2]
SLOW_SECONDS = 1.0  # a call that takes longer is timed once


@dataclasses.dataclass(frozen=True)
class Call:
    """Work on a device that `start` begins and that is over once `wait` has its result."""

    start: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    count: int = 1  # how often one start does the work


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much to time."""

    rounds: int = 7
    seconds: float = 0.1  # of one round of one call


def time_call(function: Callable, args: tuple, effort: Effort) -> float:
    """Median seconds of a function of arrays, compiled."""
    compiled = jax.jit(function)
    seconds, errors = time_in_turn({"": lambda: Call(lambda: compiled(*args))}, effort)
    if errors:
        raise UserError(f"timing failed: {errors['']}")
    return seconds[""]


def time_in_turn[Name](
    builders: dict[Name, Callable[[], Call]], effort: Effort
) -> tuple[dict[Name, float], dict[Name, str]]:
    """Median seconds of each call, taken in turn; of those that raise, the error in one line."""
    times, starts, errors = {}, {}, {}

    def guarded(name: Name, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # whatever another library raises is a finding, not an end
            errors[name] = one_line(error)

    def first(name: Name) -> None:
        call = builders[name]()
        _sample(call, 1)  # compiles
        once = _sample(call, 1)
        times[name] = [once] if once * call.count > SLOW_SECONDS else []
        starts[name] = call, max(1, int(effort.seconds / (once * call.count)))

    for name in builders:
        guarded(name, lambda name=name: first(name))
    unhurried = [name for name in times if not times[name]]
    for _ in range(effort.rounds):
        for name in unhurried:
            if name not in errors:
                guarded(name, lambda name=name: times[name].append(_sample(*starts[name])))
    return {name: statistics.median(times[name]) for name in times if name not in errors}, errors


def _sample(call: Call, starts: int) -> float:
    """Seconds of the work done once, over a number of starts with one wait at the end."""
    begin, result = time.perf_counter(), None
    for _ in range(starts):
        result = call.start()
    call.wait(result)
    return (time.perf_counter() - begin) / (starts * call.count)


def one_line(error: Exception) -> str:
    """Its type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def today() -> str:
    """The date, as in ISO 8601."""
    return datetime.date.today().isoformat()


def versions() -> dict[str, str]:
    """Of what every benchmark runs on."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


def first_line_of(*command: str) -> str | None:
    """What a command prints first; None if it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def package_version(name: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def torch_with_cuda():
    """The module; None if it is not there or sees no GPU."""
    try:
        torch = importlib.import_module("torch")
    except Exception:  # absent, or broken beside this CUDA
        return None
    return torch if torch.cuda.is_available() else None


def git_commit() -> str | None:
    """The commit that runs, marked if files differ from it; None outside a repository."""
    if not (ROOT / ".git").exists():  # an installed package may lie in someone else's repository
        return None
    return first_line_of("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def write_json(path: str | None, figures: dict) -> None:
    """Writes the figures, if a path was given."""
    if path is not None:
        outputs.write_json(path, figures)
