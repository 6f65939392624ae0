"""Renders chats into token ids: by the checkpoint's chat template, else in Llama 4's chat format.

The text between two special tokens is that of the chat template published with the Hugging Face
checkpoints. It is encoded piece by piece, so that nothing in a message can become a special token.
Unlike that template, which loses or garbles them, this module keeps an assistant turn with an empty
list of tool calls, a system message of several text items, tools before a first user message that
is a list of items, and tool call arguments that are already JSON text.
"""

import json
from dataclasses import dataclass, replace

from jaxmoe.errors import UserError
from jaxmoe.images import PictureReader
from jaxmoe.text.messages import (
    PICTURE,
    Json,
    check_messages,
    check_tools,
    encode_marked,
    joined,
    unused_characters,
)
from jaxmoe.text.pictures import Prompt, expanded, take_pictures
from jaxmoe.text.template_chat import render_by_template
from jaxmoe.text.tokenizer import BEGIN_OF_TEXT, Tokenizer

_HEADER_START = "<|header_start|>"
_HEADER_END = "<|header_end|>"
_END_OF_TURN = "<|eot|>"
_PYTHON_START = "<|python_start|>"
_PYTHON_END = "<|python_end|>"
_NEEDED = (BEGIN_OF_TEXT, _HEADER_START, _HEADER_END, _END_OF_TURN)

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "ipython": "ipython",
    "tool": "ipython",
}

_TOOLS_IN_SYSTEM = "Environment: ipython\n"
# The missing space between the last two sentences is the published template's.
_TOOLS_IN_USER = (
    "Given the following functions, please respond with a JSON for a function call with its proper "
    "arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and '
    "its value}.Do not use variables.\n\n"
)


@dataclass(frozen=True)
class _Turn:
    """A message: its role's name in the format, its text, and its tool calls as JSON text.

    A character that is nowhere else stands for each picture in its text.
    """

    role: str
    text: str
    calls: str = ""


def render(
    messages: Json,
    tokenizer: Tokenizer,
    tools: Json = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The token ids of a conversation without pictures, beginning with the begin-of-text token.

    If the tokenizer has chat templates, they render it (`render_by_template`).

    Args:
        messages: a list of `{"role": ..., "content": ...}`; a role is system (also called
            developer), user, assistant, or ipython (also called tool) for the result of a tool.
            Content is a string or a list of `{"type": "text", "text": ...}`; a tool's result may be
            any JSON value. An assistant message may have `tool_calls`, each
            `{"function": {"name": ..., "arguments": {...}}}`.
        tokenizer: one that has chat templates, or the special tokens of the Llama 4 format.
        tools: a list of JSON objects that describe functions; they are written into the first user
            message.
        add_generation_prompt: whether to open the assistant's turn at the end.

    Raises:
        UserError: if the tokenizer has neither templates nor the special tokens, or a message is
            not as described above.
    """
    return render_chat(messages, tokenizer, None, tools, add_generation_prompt).tokens


def render_chat(
    messages: Json,
    tokenizer: Tokenizer,
    reader: PictureReader | None,
    tools: Json = None,
    add_generation_prompt: bool = True,
    images: Json = None,
) -> Prompt:
    """A conversation that may have pictures, as `render` without any.

    A picture is an item of a list that is a message's content: `{"type": "image_url", "image_url":
    {"url": ...}}`, `{"type": "image"}` with `image`, `path`, `url`, `base64` or `data`, or
    `{"type": "input_image", "image_url": ...}`. Or a message has a list `images`, and `<image>` or
    `<|image|>` in its text for each. A tool's result may be a list of texts and pictures; it is
    written as one JSON text. Elsewhere, names of special tokens are plain text.

    Args:
        messages, tokenizer, tools, add_generation_prompt: as for `render`.
        reader: opens the pictures; None if the model has no vision tower.
        images: a list of pictures whose places the texts of all messages mark.

    Raises:
        UserError: as `render`, or if a picture cannot be used, or there are not as many places as
            pictures.
    """
    messages, pictures = take_pictures(messages, reader, images)
    if tokenizer.templates:
        ids = render_by_template(messages, tokenizer, tools, add_generation_prompt)
    else:
        ids = _built_in(messages, tokenizer, tools, add_generation_prompt, bool(pictures))
    return expanded(ids, pictures, tokenizer)


def _built_in(
    messages: Json, tokenizer: Tokenizer, tools: Json, add_generation_prompt: bool, pictures: bool
) -> list[int]:
    """The token ids of a conversation in Llama 4's format, with `<|image|>` for each picture."""
    _check_chat_format(tokenizer)
    check_messages(messages)
    mark = next(unused_characters(messages)) if pictures else None
    turns = [_turn(message, f"messages[{index}]", mark) for index, message in enumerate(messages)]
    if turns[0].role == "system":
        turns[0] = replace(turns[0], text=turns[0].text.strip())
    if tools:
        turns = _with_tools(turns, tools)
    ids = [tokenizer.bos_id]
    for turn in turns:
        ids += _turn_ids(turn, mark, tokenizer)
    if add_generation_prompt:
        ids += header_ids("assistant", tokenizer) + tokenizer.encode("\n\n")
    return ids


def _check_chat_format(tokenizer: Tokenizer) -> None:
    missing = [name for name in _NEEDED if name not in tokenizer.specials]
    if missing:
        raise UserError(
            "the model has no chat format: it comes without a chat template, and its tokenizer "
            f"lacks {', '.join(missing)} of Llama 4's; copy its chat_template.jinja beside it, or "
            'use "prompt" with --parse-special instead of "messages"'
        )


def _turn_ids(turn: _Turn, picture: str | None, tokenizer: Tokenizer) -> list[int]:
    ids = header_ids(turn.role, tokenizer)
    if turn.calls:
        ids += [
            *tokenizer.encode("\n\n"),
            tokenizer.special(_PYTHON_START),
            *encode_marked(turn.text, picture, tokenizer),
            tokenizer.special(_PYTHON_END),
            *tokenizer.encode(turn.calls),
        ]
    else:
        # Encoded as one text, since a newline at its start merges with those of the header.
        ids += encode_marked("\n\n" + turn.text, picture, tokenizer)
    return [*ids, tokenizer.special(_END_OF_TURN)]


def header_ids(role: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens that open a turn, up to the blank line after them."""
    start, end = tokenizer.special(_HEADER_START), tokenizer.special(_HEADER_END)
    return [start, *tokenizer.encode(role), end]


def _with_tools(turns: list[_Turn], tools: Json) -> list[_Turn]:
    """The turns with descriptions of the tools in the first user message.

    Raises:
        UserError: if that is not the first message after the system message.
    """
    check_tools(tools)
    system, rest = turns[:1], turns[1:]
    if system[0].role != "system":
        system, rest = [], turns
    if not rest or rest[0].role != "user":
        raise UserError("tools go into the first user message; begin with one, or a system message")
    listed = "".join(_json(tool, indent=4) + "\n\n" for tool in tools)
    user = replace(rest[0], text=_TOOLS_IN_USER + listed + rest[0].text.strip())
    return [*(replace(turn, text=_TOOLS_IN_SYSTEM + turn.text) for turn in system), user, *rest[1:]]


def _turn(message: Json, where: str, picture: str | None) -> _Turn:
    """A message as a turn.

    Args:
        message: as `render_chat` describes it, with its pictures taken out.
        where: its name in error messages.
        picture: a character that stands for a picture in the turn's text.

    Raises:
        UserError: if it is not so.
    """
    if not isinstance(message, dict) or str(message.get("role")) not in _ROLES:
        raise UserError(f"{where} has no known role; give it one of {', '.join(_ROLES)}")
    role, content = _ROLES[str(message["role"])], message.get("content")
    calls = _calls(message.get("tool_calls") or [], where)
    if calls and role != "assistant":
        raise UserError(f"{where} has tool calls, which only an assistant makes; remove them")
    if content is None and calls:
        content = ""
    if content is None:
        raise UserError(f"{where} has no content; give it a text")
    has_pictures = isinstance(content, list) and PICTURE in content
    if role == "ipython" and not has_pictures:
        return _Turn(role, _json(content), calls)
    text = _text(content, where, picture)
    text = _json(text) if role == "ipython" else text
    return _Turn(role, text, calls)


def _text(content: Json, where: str, picture: str | None) -> str:
    """The text of a message's content."""
    text = joined(content, picture)
    if isinstance(text, str):
        return text
    raise UserError(
        f'{where} has content that is neither a string nor a list of {{"type": "text", '
        '"text": ...} and pictures; write it as one of these'
    )


def _calls(calls: Json, where: str) -> str:
    """The JSON text of all tool calls, without separators."""
    if not isinstance(calls, list):
        raise UserError(f"{where} has tool_calls that are not a list; write them as one")
    return "".join(_call(call, where) for call in calls)


def _call(call: Json, where: str) -> str:
    match call:
        case {"function": {"name": str(name), "arguments": dict(arguments)}}:
            parameters = _json(arguments)
        case {"function": {"name": str(name), "arguments": str(parameters)}}:
            pass
        case _:
            raise UserError(
                f"{where} has a tool call that is not "
                '{"function": {"name": ..., "arguments": {...}}}; write it so'
            )
    return f'{{"name": {_json(name)}, "parameters": {parameters}}}'


def _json(value: Json, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
