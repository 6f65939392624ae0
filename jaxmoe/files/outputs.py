"""Output files that are locked while they are written, and appear only when they are whole.

A file is written as `NAME.partial` beside it, synced and renamed. Links are followed. A device or a
pipe is written to directly, and `-` is the standard output.
"""

import contextlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxmoe.errors import UserError
from jaxmoe.files.atomic import is_same_file, lock, publish, writable
from jaxmoe.processes import on_first

PARTIAL = ".partial"


def write_file(path: str | Path, content: str | bytes) -> None:
    """Replaces the content of a file, at once or not at all.

    Args:
        path: the file, or `-` for the standard output.
        content: the new content; text is encoded in UTF-8.

    Raises:
        UserError: if the file is a folder, is being written by another process, or cannot be
            written.
    """
    with written(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def written(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` when the context ends; after an error `path` is unchanged.

    Raises:
        UserError: as `write_file`.
    """
    with writable(path):
        if (stream := direct(path)) is not None:
            with stream:
                yield stream
            return
        place = place_of(path)
        with locked(place) as (file, partial):
            file.truncate(0)
            yield file
            publish(file, partial, place)


def write_json(path: str | Path, content: Any) -> None:
    """Replaces the content of a file by indented JSON; of several processes the first one does.

    Raises:
        UserError: as `write_file`.
    """
    on_first(lambda: write_file(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n"))


def check_writable(path: str | Path, *, empty: bool = False) -> None:
    """Checks that an output can be written, before the work of computing it.

    Of several processes the first one looks, and all call it.

    Args:
        path: the file, or `-` for the standard output.
        empty: whether to refuse a file that has content.

    Raises:
        UserError: if the path is a folder, its folder does not exist or may not be written to,
            another process writes the file, or it has content and must not.
    """
    if str(path) != "-":
        on_first(lambda: _check_writable(path, empty))


def _check_writable(path: str | Path, empty: bool) -> None:
    with writable(path):
        place = place_of(path)
        if place.is_dir():
            raise UserError(f"{path} is a folder; give the name of a file.")
        if empty and place.is_file() and place.stat().st_size:
            raise UserError(f"{path} exists and is not empty; choose another or delete it.")
        if not place.parent.is_dir():
            raise UserError(f"{path} cannot be written: {place.parent} is no folder; make it.")
        if not place.exists() or place.is_file():
            with locked(place):
                pass


def place_of(path: str | Path) -> Path:
    """The path of a file after all links.

    Raises:
        UserError: if no file can have this name.
    """
    try:
        return Path(path).resolve()
    except (ValueError, RuntimeError) as error:  # a NUL, half a surrogate pair, links in a circle
        raise UserError(f"{str(path)!r} can be no file: {error}; choose another.") from None


def direct(path: str | Path) -> BinaryIO | None:
    """Opens an output that is written to directly; returns None if it is to be a regular file.

    Direct outputs are `-`, devices, pipes, and the standard output under any name.

    Raises:
        UserError: if the path is a folder.
    """
    if str(path) == "-":
        return open(os.dup(_stdout()), "wb")
    place_of(path)
    with contextlib.suppress(FileNotFoundError):
        there = os.stat(path)
        if stat.S_ISDIR(there.st_mode):
            raise UserError(f"{path} is a folder; give the name of a file.")
        if _is_stdout(there):
            return open(os.dup(_stdout()), "wb")
        if not stat.S_ISREG(there.st_mode):
            return open(path, "wb")
    return None


def _stdout() -> int:
    """The descriptor of the standard output.

    It is the process's own where `sys.stdout` is closed or no file, as in a notebook.
    """
    try:
        return sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):
        return 1


def _is_stdout(there: os.stat_result) -> bool:
    try:
        return os.path.samestat(there, os.fstat(_stdout()))
    except OSError:  # it is closed
        return False


@contextlib.contextmanager
def locked(place: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Opens and locks the file beside `place` that becomes `place` when it is published.

    The file keeps what an earlier run left in it. If it is empty at the end of the context, it is
    removed. The lock ends with the process, however that ends.

    Yields:
        The open file, and its path: `place` with `PARTIAL` appended.

    Raises:
        UserError: if another process writes it.
    """
    partial = place.with_name(place.name + PARTIAL)
    with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        lock(file.fileno(), partial)
        try:
            yield file, partial
        finally:
            with contextlib.suppress(OSError, ValueError):
                file.flush()
            with contextlib.suppress(OSError, ValueError):  # closed, or renamed by `publish`
                if not os.stat(partial).st_size and is_same_file(file.fileno(), partial):
                    partial.unlink()
