"""Reads JSON and YAML with bounded size, depth and numbers.

Files may come from anyone: whatever a library's parser raises, or would silently accept, becomes a
UserError here.
"""

import collections
import json
import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxmoe.errors import UserError

MAX_BYTES = 256 * 2**20  # a tokenizer.json with 200,000 tokens has 30 * 2**20
MAX_TEXT_BYTES = 16 * 2**30  # for files as long as users make them: text, requests, records
MAX_YAML_BYTES = 2**20  # YAML is written by hand, and parsed slowly
MAX_DEPTH = 64
MAX_DIGITS = 40  # a 128-bit number has 39
MAX_YAML_VALUES = 100_000  # with aliases expanded
_PIECE = 2**24  # bytes that are read at once


class _Refused(ValueError):
    """Content that no reader here accepts; the message completes "it cannot be used: "."""


def read_text(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        UserError: as `read_bytes`, or if it is not UTF-8.
    """
    return decode_text(read_bytes(path, max_bytes), str(path))


def decode_text(content: bytes, where: str) -> str:
    """The text of UTF-8 bytes, without a byte order mark.

    Args:
        where: the file, or the line in it, for error messages.

    Raises:
        UserError: if they are not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is no UTF-8 at byte {error.start}; write it anew.") from None


def read_bytes(path: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a file.

    Raises:
        UserError: if it cannot be read or has more than `max_bytes`.
    """
    pieces, size = [], 0  # `read(max_bytes)` would allocate that much memory at once
    try:
        with open(path, "rb") as file:
            while size <= max_bytes and (piece := file.read(_PIECE)):
                pieces.append(piece)
                size += len(piece)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL or half a surrogate pair
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{str(path)!r} cannot be read: {reason}; check its name.") from None
    if size > max_bytes:
        raise UserError(f"{path} has more than {max_bytes} bytes; is it the right file?")
    return b"".join(pieces)


def read_json(path: str | Path, max_bytes: int = MAX_BYTES) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, max_bytes), str(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text.

    Args:
        text: the text.
        where: the file, or the line in it, for error messages.

    Raises:
        UserError: if it is not JSON, names a key twice, is nested more than `MAX_DEPTH` deep, or
            has NaN, Infinity, a number that no float holds, or an integer with more than
            `MAX_DIGITS` digits.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
        _count_values(value)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        place = f"{line}column {error.colno}"
        raise UserError(f"{where} is not JSON: {error.msg} at {place}.") from None
    except RecursionError:
        raise UserError(f"{where} is nested more than {MAX_DEPTH} deep.") from None
    except ValueError as error:
        raise UserError(f"{where} cannot be used: {error}.") from None
    return value


def read_yaml(path: str | Path) -> Any:
    """The value in a YAML file; `3e-4` is a number, as in YAML 1.2.

    Raises:
        UserError: if it cannot be read, is not YAML, names a key twice, is nested more than
            `MAX_DEPTH` deep, or has more than `MAX_YAML_VALUES` values or an integer with more than
            `MAX_DIGITS` digits.
    """
    text = read_text(path, MAX_YAML_BYTES)
    try:
        value = yaml.load(text, _Loader)
        if _count_values(value) > MAX_YAML_VALUES:
            raise _Refused(f"it has more than {MAX_YAML_VALUES} values")
    except RecursionError:
        raise UserError(f"{path} is nested more than {MAX_DEPTH} deep.") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no YAML that can be used: {reason}; correct it.") from None
    return value


class Entry(NamedTuple):
    """A key of a YAML file and its value.

    Attributes:
        key: the key.
        value: what `read_yaml` makes of the value.
        written: the value with every number and word in it as it is written.
        line: of the key, from 1.
    """

    key: str
    value: Any
    written: Any
    line: int


def read_yaml_entries(path: str | Path) -> list[Entry]:
    """The entries of the mapping in a YAML file, in their order.

    Raises:
        UserError: as `read_yaml`, or if it holds no mapping of names.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} holds no mapping; write lines such as 'command: generate'.")
    node: Any = yaml.compose(read_text(path, MAX_YAML_BYTES), _Loader)
    if len(node.value) != len(content) or any(key.value not in content for key, _ in node.value):
        raise UserError(f"{path} merges mappings with <<; write the keys themselves.")
    return [
        Entry(key.value, content[key.value], _written(value), key.start_mark.line + 1)
        for key, value in node.value
    ]


def _written(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {key.value: _written(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_written(item) for item in node.value]
    return node.value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; refuses one that names a key twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _Refused(f"it names {twice!r:.80} twice")
    return found


def _integer(digits: str) -> int:
    """A JSON integer; refuses one with too many digits."""
    if len(digits) > MAX_DIGITS:
        raise _Refused(f"it has a number of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    """A JSON number with a fraction or exponent; refuses one that would be infinite."""
    number = float(digits)
    if math.isinf(number):
        raise _Refused(f"it has the number {digits:.20}, which is too large")
    return number


def _constant(name: str) -> Any:
    """Refuses NaN and Infinity, which Python's `json` accepts."""
    raise _Refused(f"{name} is no number in JSON")


def _count_values(value: Any) -> int:
    """The number of values in a value; one that occurs in several places counts in each.

    Raises:
        RecursionError: if it is nested more than `MAX_DEPTH` deep, or in itself.
    """
    known: dict[int, int] = {}

    def count(value: Any, depth: int) -> int:
        if not isinstance(value, dict | list | set | tuple):
            return 1
        if depth == MAX_DEPTH:
            raise RecursionError
        if id(value) not in known:
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            known[id(value)] = 1 + sum(count(part, depth + 1) for part in parts)
        return known[id(value)]

    return count(value, 0)


class _Loader(yaml.SafeLoader):
    """Loads YAML's plain types, with YAML 1.2's numbers; refuses a key that is named twice."""

    merged = 0  # how many values `<<` has copied in the whole file

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        counts = collections.Counter(keys)
        twice = [key for key, count in counts.items() if count > 1 and key != "<<"]
        if twice:
            raise _Refused(f"it names {min(twice)!r:.80} twice")
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Expands `<<`, unless it would copy more than `MAX_YAML_VALUES` values in all."""
        for key, merged in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                parts = merged.value if isinstance(merged, yaml.SequenceNode) else [merged]
                for part in parts:
                    if isinstance(part, yaml.MappingNode):
                        self._merge(part)
        super().flatten_mapping(node)

    def _merge(self, part: yaml.MappingNode) -> None:
        self.flatten_mapping(part)
        self.merged += len(part.value)
        if self.merged > MAX_YAML_VALUES:
            raise _Refused(f"it merges more than {MAX_YAML_VALUES} values")

    def construct_number(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_DIGITS:
            raise _Refused(f"it has a number of {len(node.value)} digits")
        return self.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
