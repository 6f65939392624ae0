"""Progress bars on stderr, with rate and time left; none where stderr is not a terminal.

What moves a bar also counts as a piece of work, by which a watchdog sees that a process goes on.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rich import progress as bars
from rich.console import Console

from jaxmoe import processes


class Work(NamedTuple):
    """How many pieces of work a process has done.

    Attributes:
        shared: those that all processes of a program do.
        alone: those within an action of `jaxmoe.processes.on_first`.
    """

    shared: int = 0
    alone: int = 0


_done = Work()


def note_work() -> None:
    """Counts a piece of work as done."""
    global _done
    if processes.acts_alone():
        _done = _done._replace(alone=_done.alone + 1)
    else:
        _done = _done._replace(shared=_done.shared + 1)


def work_done() -> Work:
    """What this process has done so far."""
    return _done


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

        def update(done: int, total: int) -> None:
            note_work()
            bar.update(task, completed=done, total=total)

        yield update


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
            note_work()
            bar.advance(task, count)
            speed = bar.tasks[task].speed
            bar.update(task, rate=f"{speed:.1f} {unit}/s" if speed else "", note=note)

        yield advance
