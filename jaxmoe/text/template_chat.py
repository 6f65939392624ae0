"""Renders messages by a checkpoint's own chat template.

A template writes text that contains its special tokens by name. So that no message can name one,
the characters that begin such a name in a message are replaced by others before the template sees
them, and restored once the text is split at the special tokens.
"""

import contextlib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping

from jaxmoe.errors import UserError
from jaxmoe.images.tokens import IMAGE
from jaxmoe.parsing import parse_json
from jaxmoe.text.messages import (
    PICTURE,
    Json,
    check_messages,
    check_tools,
    encode_marked,
    escape_in_json,
    is_text_items,
    joined,
    unused_characters,
)
from jaxmoe.text.template import ChatTemplate, TooMuch
from jaxmoe.text.tokenizer import BEGIN_OF_TEXT, Tokenizer


def render_by_template(
    messages: Json, tokenizer: Tokenizer, tools: Json = None, add_generation_prompt: bool = True
) -> list[int]:
    """The token ids of a conversation, as one of the tokenizer's templates writes it.

    A content item `PICTURE` becomes the token `<|image|>`.

    With tools, that is the template called `tool_use` if there is one. The template gets the
    messages with three changes: keys whose value is null are left out, the role developer becomes
    system where the template does not know it, and arguments of tool calls that are JSON text are
    parsed.

    Args:
        messages: a list of JSON objects with a `role` and whatever else the template reads.
        tokenizer: one with `templates`.
        tools: a list of JSON objects that describe functions.
        add_generation_prompt: whether to open the assistant's turn at the end.

    Raises:
        UserError: if the template is broken or refuses the messages.
    """
    check_messages(messages)
    tools = tools or None
    if tools is not None:
        check_tools(tools)
    template = _template(tokenizer.templates, tools)
    messages = [
        _message(message, template, f"messages[{index}]") for index, message in enumerate(messages)
    ]
    escaper = _Escaper(tokenizer.specials, [messages, tools])
    text = _render(
        template,
        escaper.escape(messages),
        escaper.picture,
        tools=escaper.escape(tools),
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **_names(tokenizer),
    )
    ids: list[int] = []
    for part in tokenizer.split(text):
        if isinstance(part, str):
            ids += encode_marked(escaper.unescape(part), escaper.picture, tokenizer)
        else:
            ids.append(part)
    return ids


def _template(templates: Mapping[str, ChatTemplate], tools: Json) -> ChatTemplate:
    """The template for a conversation with or without tools."""
    for name in ("tool_use", "default") if tools else ("default",):
        if name in templates:
            return templates[name]
    where = next(iter(templates.values())).where
    raise UserError(f"{where} has no template called default; name one of them so")


def _names(tokenizer: Tokenizer) -> dict[str, str]:
    """The variables `bos_token` and so on that templates use."""
    known = {"bos_token": BEGIN_OF_TEXT} if BEGIN_OF_TEXT in tokenizer.specials else {}
    return known | dict(tokenizer.names)


def _message(message: Json, template: ChatTemplate, where: str) -> dict[str, Json]:
    """A message as the template gets it; `where` names it in error messages."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{where} is no object with a role; give it one, such as user")
    message = {key: value for key, value in message.items() if value is not None}
    if message["role"] == "developer" and "developer" not in template.source:
        message["role"] = "system"
    if isinstance(calls := message.get("tool_calls"), list):
        message["tool_calls"] = [_call(call, where) for call in calls]
    return message


def _call(call: Json, where: str) -> Json:
    """A tool call whose arguments are parsed if they are JSON text."""
    match call:
        case {"function": {"arguments": str(text)} as function}:
            with contextlib.suppress(UserError):  # not JSON: stays text
                arguments = parse_json(text, where)
                return call | {"function": function | {"arguments": arguments}}
    return call


def _render(template: ChatTemplate, messages: list[dict], picture: str, **variables: Json) -> str:
    """The text that the template writes of the messages, with `picture` or `<|image|>` for each.

    Some templates read content only as one text, others only as a list of items, and most of these
    write nothing when they get the other. So the messages are rendered with their content as it is,
    as text and as items, until the output contains the last user message and all pictures.

    Raises:
        UserError: if every attempt fails.
    """
    failure = None
    as_text = functools.partial(joined, picture=picture)
    forms = [
        [_with_content(message, form) for message in messages] for form in (as_text, _as_items)
    ]
    pictures = sum(_count_pictures(message.get("content")) for message in messages)
    for given in (messages, *(form for form in forms if form != messages)):
        try:
            text = template.render(messages=given, **variables)
        except TooMuch:
            raise
        except UserError as error:
            failure = failure or error
        else:
            places = pictures and sum(map(text.count, (IMAGE, picture, escape_in_json(picture))))
            if places == pictures and not _misread(text, given):
                return text
    if failure:
        raise failure
    if pictures:
        raise UserError(
            f"{template.where} does not write {IMAGE} once for each of the {pictures} pictures in "
            "these messages; correct it"
        )
    return template.render(messages=messages, **variables)


def _count_pictures(content: Json) -> int:
    return content.count(PICTURE) if isinstance(content, list) else 0


def _with_content(message: dict[str, Json], form) -> dict[str, Json]:
    """A message whose content, if any, is replaced by `form(content)`."""
    return message | {"content": form(message["content"])} if "content" in message else message


def _as_items(content: Json) -> Json:
    """A text as a list of one text item; any other content unchanged."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _misread(text: str, messages: list[dict]) -> bool:
    """Whether a rendering lacks the last user message, or has a list as Python prints it."""
    contents = [message.get("content") for message in messages]
    if any(str(content) in text for content in contents if is_text_items(content) and content):
        return True
    of_user = [joined(message.get("content")) for message in messages if message["role"] == "user"]
    return bool(of_user) and isinstance(of_user[-1], str) and of_user[-1].strip() not in text


class _Escaper:
    """Escapes the names of special tokens in text, and restores them.

    The first character of every name of a special token, or of a beginning of one that text after
    it could complete, is replaced by a private-use character that the values do not have. Lengths
    stay as they are.

    Attributes:
        picture: another private-use character, which stands for a picture in a text.
    """

    def __init__(self, specials: Iterable[str], values: Json) -> None:
        names = [name for name in specials if name]
        free = unused_characters(values)
        self.picture = next(free)
        self._mark = dict(zip(sorted({name[0] for name in names}), free, strict=False))
        self._begin = re.compile("|".join(sorted(set(_beginnings(names)))) or r"(?!)")

    def escape(self, value: Json) -> Json:
        """A JSON value with every text in it escaped."""
        match value:
            case str():
                return self._begin.sub(lambda found: self._mark[found[0]], value)
            case list():
                return [self.escape(item) for item in value]
            case dict():
                return {self.escape(key): self.escape(item) for key, item in value.items()}
        return value

    def unescape(self, text: str) -> str:
        """The original of an escaped text."""
        # A template's `tojson` may have made escapes of them.
        text = text.replace(escape_in_json(self.picture), self.picture)
        for char, mark in self._mark.items():
            text = text.replace(mark, char).replace(escape_in_json(mark), char)
        return text


def _beginnings(names: list[str]) -> Iterator[str]:
    """Patterns of each name's first character, followed by its second or by the end of the text.

    Whitespace may come before the end of the text, since templates strip it.
    """
    for name in names:
        first = re.escape(name[0])
        yield f"{first}(?={re.escape(name[1])})" if len(name) > 1 else first
        yield rf"{first}(?=\s*\Z)"
