"""Files of output: lines as JSON Lines, or as a Parquet file."""

import contextlib
import io
import json
from typing import Any, Literal

from jaxmoe.batch.envelope import Json
from jaxmoe.errors import UserError


def encode_part(lines: list[dict[str, Json]], form: Literal["jsonl", "parquet"]) -> bytes:
    """The content of a file of output.

    A Parquet file has a column for each key. Texts, numbers, truth values, `tokens` and `usage` are
    as they are; any other value, and those of a column with several types, are JSON texts.

    Raises:
        UserError: if Parquet is asked for and pyarrow is not installed.
    """
    return b"".join(map(_encode, lines)) if form == "jsonl" else _parquet(lines)


def _encode(line: dict[str, Json]) -> bytes:
    try:
        return (json.dumps(line, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        return (json.dumps(line) + "\n").encode()


def _parquet(lines: list[dict[str, Json]]) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "an output of Parquet files needs pyarrow: pip install '.[batch]', or write jsonl."
        ) from None
    names = list(dict.fromkeys(key for line in lines for key in line))
    columns = {_text(name): _column(name, [line.get(name) for line in lines]) for name in names}
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def _column(name: str, values: list[Json]) -> Any:
    """A column of one type, whatever the values are."""
    import pyarrow

    kinds = {type(value) for value in values if value is not None}
    dtype = _type(name, {float} if kinds == {int, float} else kinds)
    if dtype is not None:
        with contextlib.suppress(pyarrow.ArrowException, OverflowError):  # of what does not fit
            return pyarrow.array(values, dtype)
    return pyarrow.array([_json(value) for value in values], pyarrow.string())


def _type(name: str, kinds: set[type]) -> Any:
    """The type of a column with values of these kinds; None if it holds texts."""
    import pyarrow

    whole = pyarrow.int64()
    if name == "tokens" and kinds <= {list}:
        return pyarrow.list_(whole)
    if name == "usage" and kinds <= {dict}:
        return pyarrow.struct([("prompt_tokens", whole), ("completion_tokens", whole)])
    plain = {bool: pyarrow.bool_(), int: whole, float: pyarrow.float64()}
    return plain.get(next(iter(kinds))) if len(kinds) == 1 else None


def _json(value: Json) -> str | None:
    if value is None:
        return None
    return _text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _text(text: str) -> str:
    """The text with a question mark for half of a surrogate pair, which no file holds."""
    return text.encode(errors="replace").decode()
