"""Rows of training data as texts and conversations, in the forms in which data sets come."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxmoe.errors import UserError
from jaxmoe.parsing import parse_json

type Json = Any  # a value from a JSON file

# ShareGPT's names, and those of the chat format that some files have in their place.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


class Text(NamedTuple):
    """A text, of which what follows `prompt` is learned."""

    text: str
    prompt: str | None = None


class Chat(NamedTuple):
    """A conversation, of which what the assistant says is learned; see `render_learned`."""

    messages: list[Json]
    tools: Json = None
    images: Json = None


Example = Text | Chat


def example_of(row: dict[str, Json]) -> Example:
    """What a row of a data set holds.

    Its form is the first of these whose keys it has; it may have other keys.

    - `messages`, with `tools` and `images` if there are any.
    - `conversations`, as ShareGPT's `{"from": "human", "value": ...}`; `system`, `tools`.
    - `prompt` and `completion`, both texts or both lists of messages; the completion is learned.
    - `instruction` and `output`, as Alpaca's; `input`, `system`, `history`.
    - `text`, of which everything is learned.

    Raises:
        UserError: if it has no such form, naming the key.
    """
    for keys, read in _FORMS.items():
        if all(row.get(key) is not None for key in keys):
            return read(row)
    if "chosen" in row and "rejected" in row:
        raise UserError("it is a pair of 'chosen' and 'rejected', which only preferences train on")
    raise UserError(
        "it has none of 'messages', 'conversations', 'prompt' with 'completion', 'instruction' "
        "with 'output', and 'text'"
    )


def pair_of(row: dict[str, Json]) -> tuple[Example, Example]:
    """The chosen and the rejected example of a row of preferences, both after the same prompt.

    Without a `prompt`, `chosen` and `rejected` are whole conversations, whose prompt is what they
    begin with alike.

    Raises:
        UserError: if it is no such row, naming the key.
    """
    chosen, rejected = (_needed(row, key, str | list) for key in ("chosen", "rejected"))
    prompt = row.get("prompt")
    if prompt is not None and all(_begins_with(x, prompt) for x in (chosen, rejected)):
        prompt = None  # it stands in both conversations
    if prompt is None:
        if not (isinstance(chosen, list) and isinstance(rejected, list)):
            raise UserError("it has no 'prompt', and 'chosen' and 'rejected' are not both messages")
        alike = (a == b for a, b in zip(chosen, rejected, strict=False))
        common = next((i for i, same in enumerate(alike) if not same), None)
        common = min(len(chosen), len(rejected)) if common is None else common
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    elif type(prompt) in (str, list) and not type(chosen) is type(rejected) is type(prompt):
        raise UserError(
            "it has 'prompt', 'chosen' and 'rejected' that are not all texts or all messages"
        )
    base = row | {"prompt": prompt}
    first, second = (_completion(base | {"completion": x}) for x in (chosen, rejected))
    return first, second


def _begins_with(conversation: Json, prompt: Json) -> bool:
    """Whether messages begin with those of a prompt, or with one of the user that is its text."""
    if not isinstance(conversation, list):
        return False
    if isinstance(prompt, str):
        first = conversation[0] if conversation else None
        return isinstance(first, dict) and (first.get("role"), first.get("content")) == (
            "user",
            prompt,
        )
    return isinstance(prompt, list) and bool(prompt) and conversation[: len(prompt)] == prompt


def _messages(row: dict[str, Json]) -> Chat:
    return Chat(_needed(row, "messages", list), _tools(row), row.get("images"))


def _share_gpt(row: dict[str, Json]) -> Chat:
    messages = [
        _turn(turn, f"'conversations[{i}]'")
        for i, turn in enumerate(_needed(row, "conversations", list))
    ]
    return Chat(_system(row) + messages, _tools(row), row.get("images"))


def _turn(turn: Json, where: str) -> Json:
    match turn:
        case {"role": str()}:
            return turn
        case {"from": "function_call", "value": str(text)}:
            return {"role": "assistant", "content": "", "tool_calls": _calls(text, where)}
        case {"from": str(speaker), "value": str(text)} if speaker in _SPEAKERS:
            kept = {"weight": turn["weight"]} if "weight" in turn else {}
            return {"role": _SPEAKERS[speaker], "content": text} | kept
    known = ", ".join(_SPEAKERS)
    raise UserError(
        f"it has in {where} no {{'from': ..., 'value': ...}} with text and one of {known}"
    )


def _calls(text: str, where: str) -> list[Json]:
    """The tool calls of JSON text: one `{"name": ..., "arguments": ...}`, or a list of them."""
    calls = parse_json(text, f"the function_call of {where}")
    return [{"function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _completion(row: dict[str, Json]) -> Example:
    prompt = _needed(row, "prompt", str | list)
    completion = _needed(row, "completion", type(prompt))
    if isinstance(prompt, str):
        return Text(completion, prompt)
    given = [m | {"weight": 0} if _is_assistant(m) else m for m in prompt]
    return Chat(given + completion, _tools(row), row.get("images"))


def _is_assistant(message: Json) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _alpaca(row: dict[str, Json]) -> Chat:
    asked = _needed(row, "instruction", str)
    more = _needed(row, "input", str) if row.get("input") else ""
    pairs = _needed(row, "history", list) if row.get("history") else []
    question = f"{asked}\n{more}" if more else asked
    messages = _system(row)
    for i, pair in enumerate([*pairs, [question, _needed(row, "output", str)]]):
        match pair:
            case [str(user), str(assistant)]:
                messages += [_says("user", user), _says("assistant", assistant)]
            case _:
                raise UserError(f"it has in 'history[{i}]' no pair of a question and an answer")
    return Chat(messages, _tools(row), row.get("images"))


def _text(row: dict[str, Json]) -> Text:
    return Text(_needed(row, "text", str))


def _system(row: dict[str, Json]) -> list[Json]:
    return [_says("system", _needed(row, "system", str))] if row.get("system") else []


def _tools(row: dict[str, Json]) -> Json:
    """The tools, which some data sets hold as JSON text."""
    tools = row.get("tools")
    return (parse_json(tools, "'tools'") if tools else None) if isinstance(tools, str) else tools


def _says(role: str, content: str) -> Json:
    return {"role": role, "content": content}


def _needed(row: dict[str, Json], key: str, kind: Any) -> Any:
    value = row.get(key)
    if not isinstance(value, kind):
        names = {str: "a text", list: "a list"}
        raise UserError(
            f"it has under '{key}' {value!r:.80}, not {names.get(kind, 'text or a list')}"
        )
    return value


_FORMS: dict[tuple[str, ...], Callable[[dict[str, Json]], Example]] = {
    ("messages",): _messages,
    ("conversations",): _share_gpt,
    ("prompt", "completion"): _completion,
    ("instruction", "output"): _alpaca,
    ("text",): _text,
}
