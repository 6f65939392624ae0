"""Makes a dataclass from a mapping that a user wrote, such as the content of a YAML file.

The types of the fields decide which values are accepted: plain types, `Literal`, either of these or
None, other dataclasses, numbers in a range, as in `Annotated[int, Range(1, 8)]`, and lists of any
of these, as in `tuple[str, ...]`.
"""

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

from jaxmoe.errors import UserError

_EXACT = 2**53  # up to here, every integer is exact as a float


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of numbers that a field accepts, both ends included; NaN is in none."""

    least: int | float
    most: int | float

    def __contains__(self, value: int | float) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        ends = (self.least, self.most)
        return "from {} to {}".format(*(f"{x:g}" if isinstance(x, float) else x for x in ends))


def read_fields[T](cls: type[T], content: Any, source: str) -> T:
    """Makes a dataclass, and those inside it, from mappings of their fields.

    Args:
        cls: the dataclass.
        content: the mapping.
        source: what error messages call the mapping, usually its file.

    Raises:
        UserError: for a key that is no field (naming the nearest one), a missing field, or a value
            that has another type or is out of range.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{source} holds no mapping; write lines such as 'steps: 1000'.")
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    for key in content:
        if key not in fields:
            near = get_close_matches(str(key), fields, n=1, cutoff=0)[0]
            raise UserError(
                f"{source} has the unknown key {str(key)!r:.80}; the nearest one is '{near}'."
            )
    for name, field in fields.items():
        if name not in content and _is_required(field):
            raise UserError(f"{source} lacks '{name}'; add it.")
    kinds = typing.get_type_hints(cls, include_extras=True)
    values = {key: _value(kinds[key], value, source, key) for key, value in content.items()}
    try:
        return cls(**values)
    except UserError as error:  # from the class's own checks
        raise UserError(f"{source}: {error}") from None


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _value(kind: Any, value: Any, source: str, key: str) -> Any:
    """A value converted to a field's type.

    Raises:
        UserError: if it has another type or is out of range.
    """
    if typing.get_origin(kind) is tuple:
        return _list(typing.get_args(kind)[0], value, source, key)
    if dataclasses.is_dataclass(kind):
        return read_fields(typing.cast(type, kind), value, f"{source}, {key}")
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None:
            return None
        kind = typing.get_args(kind)[0]
    if dataclasses.is_dataclass(kind):
        return read_fields(typing.cast(type, kind), value, f"{source}, {key}")
    bounds = None
    if typing.get_origin(kind) is typing.Annotated:
        kind, bounds = typing.get_args(kind)
    converted = _converted(kind, value)
    if converted is None or (bounds is not None and converted not in bounds):
        raise UserError(
            f"{source} gives '{key}' the value {value!r:.80}; expected {_expected(kind, bounds)}."
        )
    return converted


def _list(kind: Any, value: Any, source: str, key: str) -> tuple:
    if not isinstance(value, list):
        raise UserError(f"{source} gives '{key}' the value {value!r:.80}; expected a list.")
    return tuple(_value(kind, item, source, f"{key}[{i}]") for i, item in enumerate(value))


def _converted(kind: Any, value: Any) -> Any:
    """A value converted to a Literal or a plain type; None if it is not of that type."""
    if typing.get_origin(kind) is Literal:
        known = {(type(each), each) for each in typing.get_args(kind)}  # 1 is not True
        return value if isinstance(value, str | bool) and (type(value), value) in known else None
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float:  # as in `steps: 1e5`
        return int(value) if abs(value) <= _EXACT and value.is_integer() else None
    if type(value) is not kind or (kind is str and not _is_name(value)):
        return None
    return value


def _is_name(text: str) -> bool:
    """Whether a text can be a file's name: the texts in these mappings are names and paths."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _expected(kind: Any, bounds: Range | None) -> str:
    """A type and a range in words, for error messages."""
    if typing.get_origin(kind) is Literal:
        words = (str(x).lower() if isinstance(x, bool) else x for x in typing.get_args(kind))
        return " or ".join(words)
    return _NAMES[kind] + ("" if bounds is None else f" {bounds}")


_NAMES = {
    bool: "true or false",
    dict: "a mapping",
    float: "a number",
    int: "a whole number",
    str: "text",
}
