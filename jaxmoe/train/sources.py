"""Files of rows to train on: JSON Lines, JSON arrays and Parquet, one row at a time."""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from jaxmoe.errors import UserError
from jaxmoe.parsing import MAX_BYTES, parse_json, read_json

type Json = Any  # a value from a JSON file


class RawRow(NamedTuple):
    """A row before it is parsed.

    Attributes:
        path: its file.
        number: of its line or row, from 1.
        content: JSON text.
        position: bytes of the file that have been read, of a compressed file as it is stored.
    """

    path: Path
    number: int
    content: bytes
    position: int

    @property
    def where(self) -> str:
        """Its file and line, for error messages."""
        return place_of(self.path, self.number)

    def parse(self) -> dict[str, Json]:
        """The row as an object.

        Raises:
            UserError: if it is none.
        """
        try:
            row = parse_json(self.content.decode("utf-8-sig"), self.where)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where} is no UTF-8 at byte {error.start}.") from None
        if not isinstance(row, dict):
            raise UserError(f'{self.where} is no JSON object, such as {{"text": "..."}}.')
        return row


def place_of(path: str | Path, number: int) -> str:
    """The name of a row in error messages."""
    return f"{path} {'row' if Path(path).suffix in ('.parquet', '.json') else 'line'} {number}"


def files_of(pattern: str) -> list[Path]:
    """The files that a path names, or a pattern with `*`, `?` or `**`, in the order of their names.

    Raises:
        UserError: if there is none.
    """
    found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
    files = [Path(name) for name in found if not os.path.isdir(name)]
    if not files or not files[0].exists():
        raise UserError(f"{pattern} is no file; correct its name.")
    return files


def read_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a file, which is read as it ends in `.parquet` or `.json`, else line by line.

    A `.json` file that does not hold an array has a row a line, too. Lines may be compressed by
    gzip, in a file that ends in `.gz`. Empty lines are passed over.

    Raises:
        UserError: if the file cannot be read, is damaged, or has a line of more than `MAX_BYTES`.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
        elif path.suffix == ".json" and _is_array(path):
            rows = read_json(path)
            for number, row in enumerate(rows, 1):
                yield RawRow(path, number, _dumped(row), 0)
        else:
            yield from _lines(path)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}.") from None


def _is_array(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _lines(path: Path) -> Iterator[RawRow]:
    if path.suffix in (".zst", ".xz", ".bz2"):
        raise UserError(f"{path} is compressed in a way that is not read; decompress it, or gzip.")
    with open(path, "rb") as file:
        lines = cast(BinaryIO, gzip.open(file)) if path.suffix == ".gz" else file
        read: Callable[[], bytes] = lambda: lines.readline(MAX_BYTES + 1)  # noqa: E731
        for number, line in enumerate(iter(read, b""), 1):
            if len(line) > MAX_BYTES:
                raise UserError(f"{path} line {number} has more than {MAX_BYTES} bytes.")
            if line.strip():
                yield RawRow(path, number, line, file.tell())


def _parquet(path: Path) -> Iterator[RawRow]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            f"{path} needs pyarrow to be read: pip install pyarrow, or write it as JSON Lines."
        ) from None
    try:
        file = parquet.ParquetFile(path)
        number, size = 0, os.path.getsize(path)
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                position = size * number // file.metadata.num_rows
                yield RawRow(path, number, _dumped(row), position)
    except (ValueError, TypeError) as error:  # what pyarrow raises of damaged files, and bytes
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{path} is no Parquet file of texts: {reason:.200}.") from None


def _dumped(row: Json) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass")
