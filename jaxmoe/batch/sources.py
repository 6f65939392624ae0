"""Files of requests, here or on object stores: which there are, and their rows."""

import contextlib
import dataclasses
import fnmatch
import glob
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

from jaxmoe.batch.objects import HIDDEN, asking, entries, is_url, open_store
from jaxmoe.batch.storage import local_path
from jaxmoe.errors import UserError, sentence_of
from jaxmoe.files.rows import COMPRESSED, Row, rows_of

ENDINGS = (".jsonl", ".json", ".parquet")  # of files in a folder that hold requests

_FIRST = 3  # in a URL that is split at "/", what comes after the bucket
_AT_ONCE = 4 * 2**20  # bytes of an object that one request reads


@dataclasses.dataclass(frozen=True, order=True)
class Source:
    """A file of requests.

    Attributes:
        path: its path, or its URL on an object store.
        size: in bytes, as it is stored.
        stamp: another one if its content may have changed.
    """

    path: str
    size: int
    stamp: str


def find_sources(patterns: Sequence[str]) -> list[Source]:
    """The files that paths, folders, URLs and patterns name, sorted by path, each once.

    In a pattern `*` and `?` stand for parts of a name, and `**` for any folders. Of a folder, those
    files are taken that end as one of `ENDINGS`, compressed or not, and do not begin with a dot.

    Raises:
        UserError: if one of them names no file, or cannot be looked at.
    """
    found = {}
    for pattern in patterns:
        sources = _remote(pattern) if is_url(pattern) else _local(pattern)
        if not sources:
            raise UserError(f"{pattern} is no file with requests; correct its name.")
        found |= {_identity(source.path): source for source in sources}
    return sorted(found.values())


def outside(sources: Sequence[Source], folder: str) -> list[Source]:
    """The sources that are not in a folder: a job's own answers, which a pattern finds, are none.

    Raises:
        UserError: if all are.
    """
    inside = _identity(folder.rstrip("/")) + "/"
    found = [source for source in sources if not _identity(source.path).startswith(inside)]
    if not found:
        raise UserError(f"all inputs are in the output {folder}; choose another output.")
    return found


def rows(source: Source, start: int = 0) -> Iterator[Row]:
    """The rows of a source that have a number above `start`, one at a time.

    Raises:
        UserError: if the file is damaged, cannot be read, or is not as it was when it was found.
    """
    try:
        with _opened(source) as file:
            yield from rows_of(file, source.path, start)
    except OSError as error:
        raise UserError(f"{source.path} cannot be read: {error.strerror or error}.") from None


def _identity(path: str) -> str:
    return path if is_url(path) else os.path.abspath(path)


def _local(pattern: str) -> list[Source]:
    path = str(local_path(pattern))
    if os.path.isdir(path):
        names = [os.path.join(path, name) for name in os.listdir(path) if is_input(name)]
    else:
        names = glob.glob(path, recursive=True) if glob.has_magic(path) else [path]
    names = [path] if os.path.isfile(path) else names  # whatever characters its name has
    try:
        return [_local_source(os.path.normpath(name)) for name in names if os.path.isfile(name)]
    except OSError as error:
        raise UserError(f"{pattern} cannot be read: {sentence_of(error)}") from None


def _local_source(path: str) -> Source:
    found = os.stat(path)
    return Source(path, found.st_size, str(found.st_mtime_ns))


def is_input(name: str) -> bool:
    """Whether a file in a folder is one of requests, by its name."""
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return name.endswith(ENDINGS) and not name.startswith(HIDDEN)


def _opened(source: Source) -> io.BufferedReader:
    """The file, if it is the one that was found."""
    remote = is_url(source.path)
    if (_object if remote else _local_source)(source.path) != source:
        raise UserError(f"{source.path} has changed since it was found; start the job anew.")
    if not remote:
        return open(source.path, "rb")
    return io.BufferedReader(_Object(source), _AT_ONCE)


def _remote(pattern: str) -> list[Source]:
    """The objects that a URL names: one, those in a folder, or those of a pattern."""
    parts = pattern.rstrip("/").split("/")
    magic = [i for i in range(_FIRST, len(parts)) if glob.has_magic(parts[i])]
    with asking(pattern, "looked at"):
        if magic:
            folder, wanted = "/".join(parts[: magic[0]]), parts[magic[0] :]
            return [one for one, path in _listed(folder) if _matches(path.split("/"), wanted)]
        if len(parts) > _FIRST and (found := _object(pattern)):
            return [found]
        inside = _listed("/".join(parts))
        return [one for one, path in inside if "/" not in path and is_input(path)]


def _listed(folder: str) -> Iterator[tuple[Source, str]]:
    """Each object in a folder and in those inside it, with its path there; no hidden ones."""
    for entry in entries(open_store(folder)):
        path = entry["path"]
        if not any(part.startswith(HIDDEN) for part in path.split("/")):
            yield _source_of(f"{folder}/{path}", entry), path


def _object(url: str) -> Source | None:
    """The object at a URL; None if it is not there."""
    import obstore

    folder, _, name = url.rpartition("/")
    with asking(url, "looked at"), contextlib.suppress(FileNotFoundError):
        return _source_of(url, obstore.head(open_store(folder), name))
    return None


def _source_of(url: str, entry: Any) -> Source:
    return Source(url, entry["size"], str(entry["e_tag"] or entry["last_modified"]))


def _matches(path: list[str], pattern: list[str]) -> bool:
    """Whether the parts of a path match those of a pattern, as `glob` matches files."""
    if not pattern:
        return not path
    head, *rest = pattern
    if head == "**":
        return any(_matches(path[i:], rest or ["*"]) for i in range(len(path)))
    return bool(path) and fnmatch.fnmatchcase(path[0], head) and _matches(path[1:], rest)


class _Object(io.RawIOBase):
    """Reads an object, a range at a time."""

    def __init__(self, source: Source):
        folder, _, self._name = source.path.rpartition("/")
        self._source, self._store, self._at = source, open_store(folder), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._source.size}
        self._at = max(0, starts[whence] + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        import obstore

        end = min(self._at + len(buffer), self._source.size)
        if end <= self._at:
            return 0
        wanted: dict[str, Any] = {"range": (self._at, end)}
        if self._source.stamp.startswith('"'):  # an entity tag: it is still the same object
            wanted["if_match"] = self._source.stamp
        with asking(self._source.path, "read"):
            piece = obstore.get(self._store, self._name, options=cast(Any, wanted)).bytes()
        buffer[: len(piece)] = memoryview(piece)
        self._at += len(piece)
        return len(piece)
