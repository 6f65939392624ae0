"""The keys of a request line that say how its answer is generated: those of OpenAI and of vLLM.

docs/requests.md lists them.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.generation.grammar import Grammar
from jaxmoe.generation.sampling import RepetitionDetection, Sampling
from jaxmoe.generation.sampling_checks import checked

MOST_SAMPLES = 16_384  # vLLM's limit

_ID = re.compile("[0-9]{1,10}")
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_new_tokens")
_FIELDS = {  # a key with a value as it is -> the field of `Sampling`
    "temperature": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "stop_token_ids": "stop_ids",
    "ignore_eos": "ignore_eos",
    "min_tokens": "min_tokens",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "allowed_token_ids": "allowed_ids",
    "prompt_logprobs": "prompt_logprobs",
    "include_stop_str_in_output": "include_stop_in_output",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a line says about its answer.

    Attributes:
        sampling: the default with the line's changes; None if it has none.
        max_new_tokens: None if it does not say.
        n: how many answers it asks for.
        adapter: the name of its adapter; None for none.
    """

    sampling: Sampling | None
    max_new_tokens: int | None
    n: int
    adapter: str | None = None


def read_settings(
    record: dict[str, Any], default: Sampling, where: str, default_n: int = 1
) -> Settings:
    """The settings of a line; a key whose value is null is as good as absent.

    Args:
        record: the line; keys that are not in `KEYS` are ignored.
        default: the settings that the line changes.
        where: the file and line, for error messages.
        default_n: the answers that a line asks for if it does not say.

    Raises:
        UserError: that names the file, the line and the key.
    """
    given = {key: record[key] for key in KEYS if record.get(key) is not None}
    try:
        sampling = _sampling(given, default)
        most, n = _most(given), given.get("n", default_n)
        check_samples(n, sampling or default)
        adapter = check_adapter_name(given.get("adapter"))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Settings(sampling, most, n, adapter)


def check_adapter_name(value: Any) -> str | None:
    """The value, which is text or None, or else a UserError says so."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"adapter {value!r:.80} is no text; give the name of one.")
    return value


def _sampling(given: dict[str, Any], default: Sampling) -> Sampling | None:
    fields: dict[str, Any] = {}
    for key, value in given.items():
        if key in _FIELDS:
            fields[_FIELDS[key]] = _checked(key, _FIELDS[key], value)
        elif key in _READERS:
            fields[key] = _READERS[key](value)
    fields |= _logprobs(given) | _grammar(given)
    return dataclasses.replace(default, **fields) if fields else None


def _checked(key: str, name: str, value: Any) -> Any:
    """The value of a field; an error names the key too."""
    try:
        return checked(name, value)
    except UserError as error:
        raise error if key == name else UserError(f"{key}: {error}") from None


def _most(given: dict[str, Any]) -> int | None:
    keys = [key for key in _LENGTHS if key in given]
    if len(keys) > 1:
        raise UserError(f"{keys[0]} and {keys[1]} mean the same; use one of them.")
    return check_count(keys[0], given[keys[0]]) if keys else None


def check_samples(n: Any, sampling: Sampling) -> None:
    """Raises a UserError unless `n` is a number of answers that may differ."""
    if check_count("n", n, MOST_SAMPLES) > 1 and sampling.temperature == 0:
        raise UserError("n asks for equal answers; raise the temperature above 0 or leave it.")


def check_count(name: str, value: Any, most: int = 2**31 - 1) -> int:
    """The value, which is a whole number from 1 to `most`, or else a UserError names it."""
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(f"{name} {value!r:.80} is not a whole number from 1 to {most}.")
    return value


def _top_k(value: Any) -> int:
    return checked("top_k", 0 if value == -1 else value)  # -1 keeps all in vLLM


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Keys of JSON objects are text."""
    if not isinstance(value, dict) or not all(map(_ID.fullmatch, value)):
        raise UserError(f"logit_bias {value!r:.80} does not map token ids to numbers.")
    return checked("logit_bias", [(int(key), number) for key, number in value.items()])


def _repetition(value: Any) -> RepetitionDetection | None:
    """The detection that a JSON object asks for; None if it has no largest size.

    A number of 0, which is vLLM's default, counts as missing.
    """
    key, names = "repetition_detection", ("max_pattern_size", "min_pattern_size", "min_count")
    _check_object(key, value, names)
    given = {name: size for name, size in value.items() if size is not None and size != 0}
    if "max_pattern_size" not in given:
        return None
    sizes = {"min_pattern_size": 1, "min_count": 0, **given}
    try:
        return RepetitionDetection(**{name: checked(name, size) for name, size in sizes.items()})
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


_READERS: dict[str, Callable[[Any], Any]] = {
    "top_k": _top_k,
    "logit_bias": _bias,
    "repetition_detection": _repetition,
}


def _logprobs(given: dict[str, Any]) -> dict[str, Any]:
    """`logprobs` is a number as in completions, or true as in chats, with `top_logprobs`."""
    value, top = given.get("logprobs"), given.get("top_logprobs")
    if top is not None and value is not True:
        raise UserError('top_logprobs needs "logprobs": true.')
    if value is None:
        return {}
    if value is False:
        return {"logprobs": None}
    key = "logprobs" if top is None else "top_logprobs"
    number = value if value is not True else 0 if top is None else top
    return {"logprobs": _checked(key, "logprobs", number)}


def _grammar(given: dict[str, Any]) -> dict[str, Any]:
    if "structured_outputs" not in given:
        return _response_format(given["response_format"]) if "response_format" in given else {}
    if "response_format" in given and _response_format(given["response_format"])["grammar"]:
        raise UserError("response_format and structured_outputs contradict each other; use one.")
    return _structured_outputs(given["structured_outputs"])


def _response_format(value: Any) -> dict[str, Any]:
    _check_object("response_format", value, ("type", "json_schema"))
    kind = value.get("type")
    if (kind == "json_schema") != ("json_schema" in value):
        raise UserError('response_format: "json_schema" and the type json_schema need each other.')
    if kind == "json_schema":
        schema = value["json_schema"]
        named = ("name", "description", "schema", "strict")
        _check_object("response_format's json_schema", schema, named)
        return _schema("response_format", schema.get("schema"))
    if kind not in ("text", "json_object"):
        raise UserError(
            f"response_format has the type {kind!r:.80}; use text, json_object or json_schema."
        )
    return {"grammar": Grammar("json_object") if kind == "json_object" else None}


def _structured_outputs(value: Any) -> dict[str, Any]:
    kinds = ("json", "regex", "choice", "grammar", "json_object")
    _check_object("structured_outputs", value, kinds)
    given = [kind for kind in kinds if value.get(kind) not in (None, False)]
    if len(given) != 1:
        raise UserError(f"structured_outputs must hold exactly one of {', '.join(kinds)}.")
    (kind,) = given
    inner = value[kind]
    if kind == "json":
        return _schema("structured_outputs", inner)
    if kind == "json_object" and inner is not True:
        raise UserError(f"structured_outputs has json_object {inner!r:.80}, which is not true.")
    ours = {"grammar": "lark", "regex": "regex", "choice": "choice", "json_object": "json_object"}
    text = {"choice": json.dumps(inner), "json_object": ""}.get(kind, inner)
    return _made("structured_outputs", ours[kind], text)


def _schema(key: str, schema: Any) -> dict[str, Any]:
    """A schema is an object, or an object as JSON text."""
    if not isinstance(schema, dict | str):
        raise UserError(f"{key} has no schema that is an object; describe the answer by one.")
    return _made(key, "json_schema", schema if isinstance(schema, str) else json.dumps(schema))


def _made(key: str, kind: Any, text: Any) -> dict[str, Any]:
    if not isinstance(text, str):
        raise UserError(f"{key} has the {kind} {text!r:.80}, which is no text.")
    try:
        return {"grammar": Grammar(kind, text)}
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _check_object(key: str, value: Any, names: Any) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{key} {value!r:.80} is no object.")
    unknown = sorted(set(value) - set(names))
    if unknown:
        raise UserError(f"{key} has the unknown key {unknown[0]!r:.80}; it has {', '.join(names)}.")


KEYS = (
    *_LENGTHS,
    *_FIELDS,
    *_READERS,
    "n",
    "adapter",
    "logprobs",
    "top_logprobs",
    "response_format",
    "structured_outputs",
)
