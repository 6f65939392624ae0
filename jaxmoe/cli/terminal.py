"""What all commands share: exit codes for errors and interrupts, and progress bars."""

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
    """Runs a command, and exits the process if it fails.

    A mistake of the user is printed as one line, with exit code 1, and so are a full disk and lack
    of memory; Ctrl-C ends with exit code 130.
    """
    _open_closed()
    for stream in (sys.stdout, sys.stderr):  # a terminal may not be able to print all of Unicode
        cast(io.TextIOWrapper, stream).reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except (UserError, CompilerError) as error:
        print(f"error: {UserError(str(error))}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of stdout, such as `head`, has ended
        _forget_stdout()
        sys.exit(1)
    except OSError as error:  # such as a full disk
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}.", file=sys.stderr)
        _forget_stdout()
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:  # JAX raises RuntimeError for a device's memory
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
    """Opens /dev/null in place of stdout and stderr if they are closed, as under some services."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # stays open until the process ends


def _forget_stdout() -> None:
    """Redirects stdout to /dev/null: flushing its buffer at exit would raise the error again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _bar(columns: tuple, disable: bool = False) -> bars.Progress:
    """A progress bar on stderr, shown only if that is a terminal; stdout is left unchanged."""
    return bars.Progress(
        *columns,
        console=Console(stderr=True),
        disable=disable or not sys.stderr.isatty(),
        redirect_stdout=False,
    )


@contextlib.contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar of bytes; yields the function update(bytes done, bytes in all)."""
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
    label: str, total: int, unit: str, stdout_in_use: bool = False
) -> Iterator[Callable[..., None]]:
    """Shows a progress bar; yields the function advance(units done since the last call, note="").

    Args:
        label: what is in progress.
        total: how many units there are.
        unit: the name of a unit, in the plural.
        stdout_in_use: whether results are written to stdout meanwhile; if that is a terminal too,
            no bar is shown.
    """
    columns = (
        bars.TextColumn(label),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn(f"{unit}  {{task.fields[rate]}}"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[note]}"),
    )
    with _bar(columns, disable=stdout_in_use and sys.stdout.isatty()) as bar:
        task = bar.add_task(label, total=total, rate="", note="")

        def advance(count: int, note: str = "") -> None:
            bar.advance(task, count)
            speed = bar.tasks[task].speed
            bar.update(task, rate=f"{speed:.1f} {unit}/s" if speed else "", note=note)

        yield advance
