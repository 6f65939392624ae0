"""Checks of the settings of sampling: each names a field, its value and the fix in one sentence.

They also bring values into one form, so that equal settings are equal: numbers of numpy become
Python's, and lists become tuples.
"""

import dataclasses
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxmoe.errors import UserError

MOST_LOGPROBS = 20
MOST_BIAS = 100.0
_MOST = sys.float_info.max


class Range(NamedTuple):
    """The numbers that a field accepts.

    Attributes:
        kind: int or float.
        accepts: whether a number of that kind is in the range; false for NaN.
        words: completes "temperature 3 is not ".
        optional: whether None is accepted too.
    """

    kind: type
    accepts: Callable[[Any], bool]
    words: str
    optional: bool = False


_PENALTY = Range(float, lambda x: -2 <= x <= 2, "between -2 and 2; use 0 for none")
_LOGPROBS = Range(
    int,
    lambda x: 0 <= x <= MOST_LOGPROBS,
    f"a whole number from 0 to {MOST_LOGPROBS}; leave it out for none",
    optional=True,
)
_PATTERN = Range(int, lambda x: 1 <= x <= 2048, "a whole number from 1 to 2048")
_RANGES = {
    "temperature": Range(float, lambda x: 0 <= x <= _MOST, "0 or more; use 0 for greedy"),
    "top_p": Range(float, lambda x: 0 < x <= 1, "above 0 and at most 1; use 1 to keep all"),
    "top_k": Range(int, lambda x: 0 <= x < 2**31, "a whole number of 0 or more; use 0 to keep all"),
    "min_p": Range(float, lambda x: 0 <= x <= 1, "between 0 and 1; use 0 to keep all"),
    "seed": Range(int, lambda x: 0 <= x < 2**31, "a whole number from 0 to 2**31 - 1"),
    "min_tokens": Range(int, lambda x: 0 <= x < 2**31, "a whole number of 0 or more"),
    "repetition_penalty": Range(float, lambda x: 0 < x <= _MOST, "above 0; use 1 for none"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "max_pattern_size": _PATTERN,
    "min_pattern_size": _PATTERN,
    "min_count": Range(int, lambda x: 2 <= x < 2**31, "a whole number of 2 or more"),
}
_KINDS = {int: numbers.Integral, float: numbers.Real}


def checked(name: str, value: Any) -> Any:
    """The value of a setting, in its one form.

    Args:
        name: a field of `Sampling` or `RepetitionDetection`; the value of another name is returned
            as it is.

    Raises:
        UserError: if it is of another type, or out of range.
    """
    if name in _RANGES:
        return _number(name, value, _RANGES[name])
    return _CHECKS[name](name, value) if name in _CHECKS else value


def check_fields(settings: Any) -> None:
    """Brings the fields of a frozen dataclass into their one form, or raises a UserError."""
    for field in dataclasses.fields(settings):
        value = checked(field.name, getattr(settings, field.name))
        object.__setattr__(settings, field.name, value)


def _number(name: str, value: Any, range_: Range) -> int | float | None:
    if value is None and range_.optional:
        return None
    if not _is_number(value, range_.kind) or not range_.accepts(value):
        raise UserError(f"{name} {value!r:.80} is not {range_.words}.")
    return range_.kind(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{name} {value!r:.80} is neither true nor false.")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """One text, or several, none of them empty."""
    texts = (value,) if isinstance(value, str) else _tuple(name, value, "texts")
    for text in texts:
        if not isinstance(text, str) or not text:
            raise UserError(f"{name} holds {text!r:.80}, which is no text that can appear.")
        if text.encode(errors="replace").decode() != text:
            raise UserError(f"{name} holds half of a surrogate pair, which no text does.")
    return texts


def _ids(name: str, value: Any) -> tuple[int, ...]:
    return tuple(_id(name, id_) for id_ in _tuple(name, value, "token ids"))


def _some_ids(name: str, value: Any) -> tuple[int, ...] | None:
    """None, or at least one token."""
    ids = None if value is None else _ids(name, value)
    if ids == ():
        raise UserError(f"{name} holds no token; leave it out to allow all.")
    return ids


def _bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """A mapping, or pairs, that name each token once."""
    pairs = _tuple(name, value.items() if isinstance(value, Mapping) else value, "pairs")
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise UserError(f"{name} {value!r:.80} does not map token ids to numbers.")
    bias = tuple((_id(name, id_), _bias_of(name, id_, number)) for id_, number in pairs)
    if len(dict(bias)) != len(bias):
        raise UserError(f"{name} names a token twice; name it once.")
    return bias


def _bias_of(name: str, id_: Any, value: Any) -> float:
    if not _is_number(value, float) or not abs(value) <= MOST_BIAS:
        raise UserError(
            f"{name} gives token {id_!r:.80} {value!r:.80}, which is no number between "
            f"-{MOST_BIAS:g} and {MOST_BIAS:g}."
        )
    return float(value)


def _id(name: str, value: Any) -> int:
    if not _is_number(value, int) or not 0 <= value < 2**31:
        raise UserError(f"{name} holds {value!r:.80}, which is no token id.")
    return int(value)


def _tuple(name: str, value: Any, what: str) -> tuple:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise UserError(f"{name} {value!r:.80} is no list of {what}.")
    return tuple(value)


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, _KINDS[kind]) and not isinstance(value, bool)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "ignore_eos": _flag,
    "include_stop_in_output": _flag,
    "stop": _texts,
    "stop_ids": _ids,
    "allowed_ids": _some_ids,
    "logit_bias": _bias,
}
