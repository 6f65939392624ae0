"""What a batch job is: its settings, its input files, and how their rows are cut into blocks.

The manifest is made once, by whoever starts the job first, and later runs are held to it.
"""

import dataclasses
import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxmoe.batch.formats import request_of
from jaxmoe.batch.sources import Source, rows
from jaxmoe.batch.storage import Storage
from jaxmoe.errors import UserError
from jaxmoe.files.rows import Row
from jaxmoe.parsing import parse_json

NAME = "manifest.json"
GRAIN = 4  # a block's rows are a multiple of this
SMALLEST, LARGEST, BLOCKS = 16, 512, 64  # rows of a block, and how many blocks a small job has
HEAVIEST = 256 << 20  # bytes of a block's rows on average, as where they hold pictures


@dataclasses.dataclass(frozen=True)
class Input:
    """A file of requests as it was when the job began.

    Attributes:
        rows: how many it has that belong to the job.
        sha256: of these rows.
        whole: whether it has no others.
    """

    path: str
    size: int
    stamp: str
    rows: int
    sha256: str
    whole: bool


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A job, whose rows are numbered from 1 on through all its files.

    Attributes:
        job: the digest of its settings.
        inputs: its files, in their order.
        rows: how many there are.
        block: rows of a block; the last one has the rest.
        begins: the file, by its number, and the row in it that each block comes after.
        repeated: the rows whose id an earlier row has.
    """

    job: str
    inputs: tuple[Input, ...]
    rows: int
    block: int
    begins: tuple[tuple[int, int], ...]
    repeated: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self.begins)

    def size(self, block: int) -> int:
        """How many rows a block has."""
        return min(self.block, self.rows - block * self.block)

    def encode(self) -> bytes:
        """The manifest as JSON."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False).encode() + b"\n"


def decode(content: bytes, where: str) -> Manifest:
    """The manifest that `Manifest.encode` wrote.

    Raises:
        UserError: if it is none.
    """
    read: Any = parse_json(content, where)
    try:
        read["inputs"] = tuple(Input(**one) for one in read["inputs"])
        read["begins"] = tuple((file, after) for file, after in read["begins"])
        read["repeated"] = tuple(read["repeated"])
        return Manifest(**read)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where} is no manifest of this version; choose another output.") from None


def make_manifest(
    job: str,
    sources: Sequence[Source],
    *,
    limit: int | None = None,
    block: int | None = None,
    read: Callable[[int, int], object] = lambda done, total: None,
) -> Manifest:
    """Reads all rows once: counts them, remembers where blocks begin, finds repeated ids.

    It takes some 30 bytes of memory a row.

    Args:
        limit: how many rows the job has, at most.
        block: rows of a block, rounded up to a multiple of `GRAIN`; default: few in a small job, or
            where rows are large.
        read: called with the bytes of the rows so far, and of all files as they are stored.

    Raises:
        UserError: if a file cannot be read, or there is no row.
    """
    total = sum(source.size for source in sources)
    survey = _Survey(lambda done: read(done, total))
    inputs = [survey.file(i, source, limit) for i, source in enumerate(sources)]
    if not survey.count:
        named = ", ".join(source.path for source in sources)
        raise UserError(f"{named:.300} holds no requests; write one JSON object a line.")
    grains = -(-(block or _block_rows(survey.count, survey.bytes)) // GRAIN)
    begins = tuple(zip(survey.files[::grains], survey.numbers[::grains], strict=True))
    return Manifest(job, tuple(inputs), survey.count, grains * GRAIN, begins, survey.repeated())


def _block_rows(rows: int, nbytes: int) -> int:
    """How many of a job's rows make a block."""
    few = max(SMALLEST, min(LARGEST, -(-rows // BLOCKS)))
    light = HEAVIEST * rows // max(1, nbytes)
    return max(1, min(few, light // GRAIN * GRAIN))


class _Survey:
    """What is known of the rows read so far.

    Attributes:
        count, bytes: how many there are, and their lengths together.
        files, numbers: where every `GRAIN`th row comes after.
    """

    def __init__(self, read: Callable[[int], object]):
        self.count, self.bytes, self._read = 0, 0, read
        self.files, self.numbers = array("l"), array("l")
        self._ids = array("Q")  # hashes of the rows' ids

    def file(self, number: int, source: Source, limit: int | None) -> Input:
        digest, before, after = hashlib.sha256(), self.count, 0
        for row in rows(source) if limit is None or self.count < limit else ():
            if self.count % GRAIN == 0:
                self.files.append(number)
                self.numbers.append(after)
            self.count, after = self.count + 1, row.number
            self._ids.append(_id_hash(row, self.count))
            _update(digest, row)
            self.bytes += len(row.content)
            self._read(self.bytes)
            if self.count == limit:
                break
        kept, whole = self.count - before, limit is None or self.count < limit
        return Input(source.path, source.size, source.stamp, kept, digest.hexdigest(), whole)

    def repeated(self) -> tuple[int, ...]:
        ids = np.frombuffer(self._ids, np.uint64)
        order = np.argsort(ids, kind="stable")
        same = ids[order][1:] == ids[order][:-1]
        return tuple((np.sort(order[1:][same]) + 1).tolist())


def _id_hash(row: Row, number: int) -> int:
    id_ = str(request_of(row.content, "", number).envelope.id)
    digest = hashlib.blake2b(id_.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _update(digest: Any, row: Row) -> None:
    digest.update(b"%d %d\n" % (row.number, len(row.content)))
    digest.update(row.content)


def check_inputs(manifest: Manifest, sources: Sequence[Source], where: str) -> None:
    """Holds the files of a run to those that its job began with.

    A file whose size and stamp are as they were is not read again.

    Raises:
        UserError: if one of them changed, or there are others.
    """
    if [source.path for source in sources] != [known.path for known in manifest.inputs]:
        raise UserError(
            f"{where} is of a job on {len(manifest.inputs)} files from "
            f"{manifest.inputs[0].path:.80} on, and now there are others; give the same ones, or "
            "choose another output."
        )
    for known, source in zip(manifest.inputs, sources, strict=True):
        same = (source.size, source.stamp) == (known.size, known.stamp)
        if not same and _digest(source, None if known.whole else known.rows) != known.sha256:
            raise UserError(
                f"{source.path} has changed since the job in {where} began; restore it, or choose "
                "another output."
            )


def _digest(source: Source, count: int | None) -> str:
    """The digest of the first so many rows of a file, or of all."""
    digest = hashlib.sha256()
    for row in itertools.islice(rows(source), count):
        _update(digest, row)
    return digest.hexdigest()


def open_manifest(
    storage: Storage, job: str, sources: Sequence[Source], make: Callable[[], Manifest]
) -> Manifest:
    """The manifest in a job's folder, which is made there if there is none.

    Args:
        make: makes it, as `make_manifest` does.

    Raises:
        UserError: if the folder is of another job, or the files are not those that it began with.
    """
    where = f"{storage}"
    if (content := storage.read(NAME)) is None:
        made = make()
        if storage.create(NAME, made.encode()):
            return made
        content = storage.read(NAME)  # another process was quicker
        assert content is not None
    manifest = decode(content, f"{where} {NAME}")
    if manifest.job != job:
        raise UserError(
            f"{where} is of another job, or of this one with other settings; choose another output."
        )
    check_inputs(manifest, sources, where)
    return manifest


class RowReader:
    """Reads the rows of blocks; those of blocks in their order without reading any twice."""

    def __init__(self, manifest: Manifest, sources: Sequence[Source]):
        """Opens nothing yet."""
        self._manifest, self._sources = manifest, sources
        self._at: tuple[int, int] | None = None
        self._left: Iterator[tuple[int, Row]] = iter(())

    def read(self, block: int) -> list[tuple[str, Row]]:
        """The rows of a block, each with the path of its file.

        Raises:
            UserError: if a file cannot be read, or is not as it was.
        """
        begin = self._manifest.begins[block]
        if self._at is None or begin < self._at:
            self._left = self._from(*begin)
        found: list[tuple[str, Row]] = []
        for file, row in self._left:
            if (file, row.number) > begin:
                found.append((self._sources[file].path, row))
                self._at = file, row.number
            if len(found) == self._manifest.size(block):
                return found
        raise UserError(
            f"{self._sources[begin[0]].path} has fewer rows than when the job began; restore it, "
            "or choose another output."
        )

    def _from(self, file: int, after: int) -> Iterator[tuple[int, Row]]:
        for i in range(file, len(self._sources)):
            for row in rows(self._sources[i], after if i == file else 0):
                yield i, row
