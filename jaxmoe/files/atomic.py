"""The one lock and the one atomic replacement, of which every output is made.

What becomes an output is written beside it under another name, synced to disk and renamed.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxmoe.errors import UserError


def lock(descriptor: int, path: Path) -> None:
    """Locks an open file or folder until it is closed or the process ends, however that happens.

    Does not wait. On a file system without locks, as some network file systems are, nothing is
    locked.

    Args:
        descriptor: of the open file or folder.
        path: the path under which it was opened.

    Raises:
        UserError: if another process has locked it, or has moved it away since it was opened.
    """
    with contextlib.suppress(OSError):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path} is being written by another run; wait for it, or choose another output."
            ) from None
    if not is_same_file(descriptor, path):
        raise UserError(f"{path} was written by another run a moment ago; run again.")


def is_same_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one that has this path; False if none has it."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the `lock` of an existing folder while the context lasts.

    Raises:
        UserError: as `lock`.
        OSError: if the folder cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def publish(file: BinaryIO, partial: Path, place: Path) -> None:
    """Syncs an open file that has the path `partial`, and renames it to `place`.

    A file that was there is replaced at once: no reader sees a part of either.

    Raises:
        OSError: if the file system refuses; then `place` is as it was.
    """
    file.flush()
    os.fsync(file.fileno())
    rename(partial, place)


def publish_new(file: BinaryIO, partial: Path, place: Path) -> bool:
    """Syncs an open file that has the path `partial`, and links it to `place` if nothing is there.

    Of several processes and hosts that do so at once, one succeeds, on network file systems too.

    Returns:
        Whether `place` is now this file.

    Raises:
        OSError: if the file system refuses, or has no hard links.
    """
    file.flush()
    os.fsync(file.fileno())
    try:
        os.link(partial, place)
    except FileExistsError:
        # A network file system may lose its reply, ask again, and find its own link.
        if not is_same_file(file.fileno(), place):
            return False
    sync(place.parent)
    return True


def rename(source: Path, place: Path) -> None:
    """Renames a file or folder, in such a way that a loss of power does not undo it.

    Raises:
        OSError: if the file system refuses.
    """
    source.rename(place)
    sync(place.parent)


def sync(path: Path) -> None:
    """Returns once a file's content, or the names in a folder, would survive a loss of power.

    Raises:
        OSError: if a file cannot be synced. A folder that cannot is passed over: some file systems
            sync no folders.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def check_space(path: Path, nbytes: int) -> None:
    """Refuses an output that is larger than the free space of its disk.

    Args:
        path: where the output is to be; neither it nor its folder need exist.
        nbytes: the size of the output.

    Raises:
        UserError: if fewer bytes are free.
    """
    free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
    if nbytes > free:
        raise UserError(
            f"{path.parent} has {free:,} bytes free, but {nbytes:,} are needed; "
            "free some space or choose another output."
        )


@contextlib.contextmanager
def writable(path: str | Path) -> Iterator[None]:
    """Turns every OSError within the context into a UserError: `path` cannot be written.

    A BrokenPipeError passes: a reader of the standard output, such as `head`, has read enough.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
