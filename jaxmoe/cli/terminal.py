"""What every script shares: how errors and interrupts end, and how progress is shown."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import cast

from rich import progress as bars
from rich.console import Console

from jaxmoe.errors import UserError
from pallas_kernels.compile.errors import CompilerError


def run(main: Callable[[], None]) -> None:
    """Runs a script: a mistake of the user's is one line and exit 1, Ctrl-C is exit 130."""
    _open_closed()
    for stream in (sys.stdout, sys.stderr):  # of a terminal that is not UTF-8
        cast(io.TextIOWrapper, stream).reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except (UserError, CompilerError) as error:
        print(f"error: {UserError(str(error))}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader, such as head, has had enough
        _forget_stdout()
        sys.exit(1)
    except OSError as error:  # a disk that is full, or may not be written
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}.", file=sys.stderr)
        _forget_stdout()
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:  # of a device, JAX says it so
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = str(error).partition("\n")[0].rstrip(".")
        print(
            f"error: the memory does not suffice{f' ({why:.300})' if why else ''}; use more "
            "devices, fewer tokens at once or smaller weights: jaxmoe plan says what fits.",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _open_closed() -> None:
    """Stands in for streams that were closed before, as some services do: what is said is lost."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # until the process ends


def _forget_stdout() -> None:
    """What is left in its buffer would fail again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _bar(columns: tuple, disable: bool = False) -> bars.Progress:
    """On stderr if that is a terminal; stdout, which is for answers, is left alone."""
    return bars.Progress(
        *columns,
        console=Console(stderr=True),
        disable=disable or not sys.stderr.isatty(),
        redirect_stdout=False,
    )


@contextlib.contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left, fed with (bytes done, bytes in all); none off a terminal."""
    columns = (
        bars.TextColumn(label),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with _bar(columns) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def task_progress(
    label: str, total: int, unit: str, beside_answers: bool = False
) -> Iterator[Callable[..., None]]:
    """A bar with rate and time left, fed with (units done, a few words); none off a terminal.

    Args:
        beside_answers: whether answers go to stdout meanwhile: no bar is drawn into them.
    """
    columns = (
        bars.TextColumn(label),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn(f"{unit}  {{task.fields[rate]}}"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[note]}"),
    )
    with _bar(columns, disable=beside_answers and sys.stdout.isatty()) as bar:
        task = bar.add_task(label, total=total, rate="", note="")

        def advance(count: int, note: str = "") -> None:
            bar.advance(task, count)
            speed = bar.tasks[task].speed
            bar.update(task, rate=f"{speed:.1f} {unit}/s" if speed else "", note=note)

        yield advance
