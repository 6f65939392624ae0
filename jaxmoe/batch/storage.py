"""A folder of small files, on a file system or on an object store: one interface for both.

A file there is whole or it is not there, whatever process or host ends while it is written.
"""

import contextlib
import errno
import os
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

from jaxmoe.batch.objects import HIDDEN, ObjectStorage, checked_name
from jaxmoe.batch.process_name import has_ended, process_name
from jaxmoe.errors import UserError, sentence_of
from jaxmoe.files.atomic import publish, publish_new, writable
from jaxmoe.files.outputs import PARTIAL


@runtime_checkable
class Storage(Protocol):
    """A folder; the names of files in it may have folders in front, as in `parts/000001.jsonl`.

    Every method raises a UserError, one sentence with the place, if the store refuses.
    """

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if it is not there."""
        ...

    def put(self, name: str, content: bytes) -> None:
        """Writes a file, whole or not at all; replaces one that is there."""
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file if it is not there, whole or not at all.

        Of all processes and hosts that create a name at once, one gets True. A file that is there
        with this very content may be the one that this call wrote, when the store's reply was lost:
        give each owner's file a content of its own.

        Returns:
            Whether the file is this call's.
        """
        ...

    def names(self, prefix: str = "") -> list[str]:
        """The names of files that begin with `prefix`, sorted; those in inner folders too."""
        ...

    def delete(self, name: str) -> None:
        """Removes a file, if it is there."""
        ...

    def sweep(self) -> None:
        """Removes unfinished files of processes that were killed on this machine."""
        ...

    def append(self, name: str) -> BinaryIO | None:
        """Opens a file to append to, which `flush` hands to the system; None if none can be."""
        ...


def storage_of(place: str | Path) -> Storage:
    """The storage at a path, or at a URL with `file:`, `s3://`, `gs://` or `az://`.

    Raises:
        UserError: if the URL is none of these, or the package for object stores is not installed.
    """
    local = local_path(str(place))
    return ObjectStorage(str(place)) if local is None else LocalStorage(local)


def local_path(place: str) -> Path | None:
    """The path that a place on this machine's file systems has; None for a URL of another kind.

    Raises:
        UserError: if it is a `file:` URL of another host.
    """
    if place.startswith("file:"):
        parts = urllib.parse.urlsplit(place)
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"{place!r:.80} is on another host; give a path of this one.")
        return Path(urllib.request.url2pathname(parts.path))
    return None if "://" in place else Path(place)


class LocalStorage:
    """A folder of a file system, of a network's too; it is made when the first file is written.

    A file is written under a hidden name beside its own, which begins with the process's, synced,
    and renamed or linked.
    """

    def __init__(self, folder: Path):
        """The storage in a folder, which need not exist."""
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def read(self, name: str) -> bytes | None:
        """As `Storage.read`."""
        path = self._path(name)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error

    def put(self, name: str, content: bytes) -> None:
        """As `Storage.put`."""
        with self._written(name, content) as (file, partial, path):
            publish(file, partial, path)

    def create(self, name: str, content: bytes) -> bool:
        """As `Storage.create`."""
        if self._path(name).exists():
            return False
        with self._written(name, content) as (file, partial, path), _linking(self._folder):
            return publish_new(file, partial, path)

    def names(self, prefix: str = "") -> list[str]:
        """As `Storage.names`."""
        inner = self._folder / prefix.rpartition("/")[0]
        found = []
        for folder, folders, files in os.walk(inner, onerror=self._unlisted):
            folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
            at = Path(folder).relative_to(self._folder)
            found += [(at / name).as_posix() for name in files if not name.startswith(HIDDEN)]
        return sorted(name for name in found if name.startswith(prefix))

    def delete(self, name: str) -> None:
        """As `Storage.delete`."""
        path = self._path(name)
        with writable(path):
            path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """As `Storage.sweep`."""
        for partial in self._folder.rglob(f"{HIDDEN}*{PARTIAL}"):
            if has_ended(partial.name.removeprefix(HIDDEN).partition(".")[0]):
                with writable(partial):
                    partial.unlink(missing_ok=True)

    def append(self, name: str) -> BinaryIO:
        """As `Storage.append`."""
        path = self._path(name)
        with writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            return open(path, "ab")

    def _path(self, name: str) -> Path:
        return self._folder / checked_name(name)

    @contextlib.contextmanager
    def _written(self, name: str, content: bytes) -> Iterator[tuple[BinaryIO, Path, Path]]:
        """A new file with this content, its path, and the path that it is to get.

        It is removed at the end, unless it was renamed.
        """
        path = self._path(name)
        with writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{HIDDEN}{process_name()}.{uuid.uuid4().hex}{PARTIAL}")
            try:
                with open(partial, "xb") as file:
                    file.write(content)
                    yield file, partial, path
            finally:
                partial.unlink(missing_ok=True)

    def _unlisted(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise UserError(f"{self} cannot be listed: {sentence_of(error)}") from error


@contextlib.contextmanager
def _linking(folder: Path) -> Iterator[None]:
    """Names what a folder lacks where the file system refuses hard links."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        raise UserError(
            f"{folder} is on a file system without hard links, where two processes could take the "
            "same work; choose a folder on another, or the URL of an object store."
        ) from error
