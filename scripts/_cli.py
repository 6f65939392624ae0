"""What every script shares: how errors and interrupts end, and how progress is shown."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from rich import progress as bars
from rich.console import Console

from jaxmoe.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Runs a script: a mistake of the user's is one line and exit 1, Ctrl-C is exit 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


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
    console = Console(stderr=True)
    with bars.Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def task_progress(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left, advanced by a number of units; none off a terminal."""
    columns = (
        bars.TextColumn(label),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn(f"{unit}  {{task.fields[rate]}}"),
        bars.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with bars.Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=total, rate="")

        def advance(count: int) -> None:
            bar.advance(task, count)
            speed = bar.tasks[task].speed
            bar.update(task, rate=f"{speed:.1f} {unit}/s" if speed else "")

        yield advance
