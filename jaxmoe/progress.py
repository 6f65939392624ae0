"""Progress bars on stderr, with rate and time left; none where stderr is not a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich import progress as bars
from rich.console import Console


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
