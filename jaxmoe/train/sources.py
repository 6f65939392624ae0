"""Files of rows to train on: JSON Lines, JSON arrays and Parquet, one row at a time."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxmoe.errors import UserError
from jaxmoe.files.rows import place_of_row, rows_of
from jaxmoe.parsing import MAX_BYTES, decode_text, parse_json

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
        return place_of_row(self.path, self.number)

    def parse(self) -> dict[str, Json]:
        """The row as an object.

        Raises:
            UserError: if it is none.
        """
        row = parse_json(decode_text(self.content, self.where), self.where)
        if not isinstance(row, dict):
            raise UserError(f'{self.where} is no JSON object, such as {{"text": "..."}}.')
        return row


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
    """The rows of a file, which is read as `jaxmoe.files.rows.rows_of` says.

    Raises:
        UserError: if the file cannot be read, is damaged, or has a line of more than `MAX_BYTES`.
    """
    try:
        with open(path, "rb") as file:
            for row in rows_of(file, str(path)):
                if len(row.content) > MAX_BYTES:
                    raise UserError(f"{path} line {row.number} has more than {MAX_BYTES} bytes.")
                yield RawRow(path, row.number, row.content, file.tell())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
