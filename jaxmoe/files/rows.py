"""Rows of files: lines, compressed or not, and rows of Parquet files, one at a time as JSON."""

import base64
import datetime
import decimal
import gzip
import io
import json
import math
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from jaxmoe.errors import UserError
from jaxmoe.parsing import MAX_BYTES, decode_text, parse_json

type Json = Any  # a value from a JSON file

COMPRESSED = (".gz", ".zst")
_UNREAD = (".xz", ".bz2", ".zip")
_WHOLE = (".parquet", ".json")  # files that have rows and not lines
# What is raised of damaged files: by gzip the first ones, by pyarrow the others.
_DAMAGE = (OSError, EOFError, zlib.error, ValueError, TypeError, NotImplementedError)

_PIECE = 2**20  # bytes of an overlong line that are passed over at once
_BATCH = 64  # rows of a Parquet file that are in memory at once
_PICTURES = {  # how files of pictures begin -> their type
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
}


class Row(NamedTuple):
    """A row before it is parsed.

    Attributes:
        number: of its line or row, from 1.
        content: one JSON value as UTF-8; of a line of more than `MAX_BYTES`, its first
            `MAX_BYTES` + 1 bytes.
    """

    number: int
    content: bytes


def rows_of(file: io.BufferedIOBase, name: str, start: int = 0) -> Iterator[Row]:
    """The rows of an open file, read as its name ends in `.parquet` or `.json`, else line by line.

    A `.json` file that does not hold an array has a row a line, too. Lines may be compressed, in a
    file that ends in `.gz` or `.zst`. Blank lines are passed over.

    Args:
        file: at its beginning; it can seek.
        name: its path or URL, for error messages too.
        start: rows or lines that are left out at the beginning.

    Raises:
        UserError: if the file cannot be read or is damaged.
    """
    last = 0
    try:
        for row in _rows(file, name, start):
            last = row.number
            yield row
    except UserError:
        raise
    except _DAMAGE as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
        after = f" after {_row_word(name)} {last}" if last else ""
        raise UserError(f"{name} cannot be read{after}: {reason:.200}.") from None


def place_of_row(path: str | Path, number: int) -> str:
    """The name of a row in error messages: its file, and the number of its row or line."""
    return f"{path} {_row_word(str(path))} {number}"


def _row_word(name: str) -> str:
    return "row" if name.endswith(_WHOLE) else "line"


def _rows(file: io.BufferedIOBase, name: str, start: int) -> Iterator[Row]:
    if name.endswith(".parquet"):
        return _parquet(file, name, start)
    if name.endswith(".json") and _is_array(file):
        return _array(file, name, start)
    return _lines(_decompressed(file, name), start)


def _decompressed(file: io.BufferedIOBase, name: str) -> io.BufferedIOBase:
    if name.endswith(_UNREAD):
        raise UserError(f"{name} is compressed in a way that is not read; decompress it, or gzip.")
    if name.endswith(".gz"):
        return cast(io.BufferedIOBase, gzip.open(cast(Any, file)))
    if name.endswith(".zst"):
        stream = _pyarrow(name).CompressedInputStream(file, "zstd")
        return io.BufferedReader(stream, _PIECE)
    return file


def _lines(file: io.BufferedIOBase, start: int) -> Iterator[Row]:
    """The lines of a file that are not blank; they end with a newline, and with nothing else."""
    for number, line in enumerate(iter(lambda: file.readline(MAX_BYTES + 1), b""), 1):
        if len(line) > MAX_BYTES and not line.endswith(b"\n"):
            _pass_line(file)
        if number > start and line.strip():
            yield Row(number, line)


def _pass_line(file: io.BufferedIOBase) -> None:
    while (piece := file.readline(_PIECE)) and not piece.endswith(b"\n"):
        pass


def _is_array(file: io.BufferedIOBase) -> bool:
    head = file.read(1024)
    file.seek(0)
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _array(file: io.BufferedIOBase, name: str, start: int) -> Iterator[Row]:
    content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"{name} is an array of more than {MAX_BYTES} bytes; write a row a line.")
    rows = parse_json(decode_text(content, name), name)
    for number, row in enumerate(rows[start:], start + 1):
        yield Row(number, _dumped(row))


def _parquet(file: io.BufferedIOBase, name: str, start: int) -> Iterator[Row]:
    _pyarrow(name)
    import pyarrow.parquet as parquet

    table = parquet.ParquetFile(file)
    first, groups = _groups_after(table.metadata, start)
    batches = table.iter_batches(batch_size=_BATCH, row_groups=groups)
    rows = (row for batch in batches for row in batch.to_pylist())
    for number, row in enumerate(rows, first + 1):
        if number > start:
            yield Row(number, _dumped(_plain(row)))


def _groups_after(metadata: Any, start: int) -> tuple[int, list[int]]:
    """The rows before the first group that has a row after `start`, and the groups from there."""
    first, group = 0, 0
    while group < metadata.num_row_groups:
        size = metadata.row_group(group).num_rows
        if first + size > start:
            break
        first, group = first + size, group + 1
    return first, list(range(group, metadata.num_row_groups))


def _plain(value: Any) -> Json:
    """A value of a Parquet file as one that JSON has; NaN, which it has not, becomes null.

    Bytes of a picture become a data: URL, and others base64.

    Raises:
        TypeError: if JSON has nothing like it.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return None if math.isnan(value) else value
        case dict():
            return {str(key): _plain(one) for key, one in value.items()}
        case list() | tuple():
            return [_plain(one) for one in value]
        case bytes():
            return _text_of(value)
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal() | uuid.UUID():
            return str(value)
    raise TypeError(f"it has a value of the type {type(value).__name__}, which JSON has not")


def _text_of(content: bytes) -> str:
    encoded = base64.b64encode(content).decode()
    kinds = [kind for start, kind in _PICTURES.items() if content.startswith(start)]
    return f"data:{kinds[0]};base64,{encoded}" if kinds else encoded


def _pyarrow(name: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            f"{name} needs pyarrow to be read: pip install pyarrow, or write it as JSON Lines."
        ) from None
    return pyarrow


def _dumped(row: Json) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass")
