"""Messages rendered by the checkpoint's own chat template.

A template writes text in which its special tokens stand by name. So that no message can name one,
the characters that begin such a name in a message are replaced by others before the template sees
them, and put back once the text is cut at the special tokens.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping

from jaxmoe.errors import UserError
from jaxmoe.parsing import parse_json
from jaxmoe.text.messages import Json, check_messages, check_tools, is_text_items, joined
from jaxmoe.text.template import ChatTemplate, TooMuch
from jaxmoe.text.tokenizer import BEGIN_OF_TEXT, Tokenizer

_PRIVATE = range(0xE000, 0xF900)  # code points that Unicode leaves to its users


def render_by_template(
    messages: Json, tokenizer: Tokenizer, tools: Json = None, add_generation_prompt: bool = True
) -> list[int]:
    """The token ids of a conversation, as one of the tokenizer's templates writes it.

    The template called `tool_use` writes those with tools, if there is one. It sees the messages as
    they are, but for the keys that are null, which are left out; a developer, who is a system where
    the template does not know the role; and arguments of tool calls that are JSON text, which are
    read.

    Args:
        messages: a list of JSON objects with a `role`, and all else that the template reads.
        tokenizer: one with `templates`.
        tools: a list of JSON objects that describe functions.
        add_generation_prompt: whether to open the assistant's turn at the end.

    Raises:
        UserError: the template is broken or refuses the messages, or they hold images.
    """
    check_messages(messages)
    tools = tools or None
    if tools is not None:
        check_tools(tools)
    template = _template(tokenizer.templates, tools)
    messages = [
        _message(message, template, f"messages[{index}]") for index, message in enumerate(messages)
    ]
    shield = _Shield(tokenizer.specials, [messages, tools])
    text = _render(
        template,
        shield.over(messages),
        tools=shield.over(tools),
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **_names(tokenizer),
    )
    ids: list[int] = []
    for part in tokenizer.split(text):
        ids += [part] if isinstance(part, int) else tokenizer.encode(shield.off(part))
    return ids


def _template(templates: Mapping[str, ChatTemplate], tools: Json) -> ChatTemplate:
    for name in ("tool_use", "default") if tools else ("default",):
        if name in templates:
            return templates[name]
    where = next(iter(templates.values())).where
    raise UserError(f"{where} has no template called default; name one of them so")


def _names(tokenizer: Tokenizer) -> dict[str, str]:
    known = {"bos_token": BEGIN_OF_TEXT} if BEGIN_OF_TEXT in tokenizer.specials else {}
    return known | dict(tokenizer.names)


def _message(message: Json, template: ChatTemplate, where: str) -> dict[str, Json]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{where} is no object with a role; give it one, such as user")
    message = {key: value for key, value in message.items() if value is not None}
    if message["role"] == "developer" and "developer" not in template.source:
        message["role"] = "system"
    if isinstance(calls := message.get("tool_calls"), list):
        message["tool_calls"] = [_call(call, where) for call in calls]
    return message


def _call(call: Json, where: str) -> Json:
    match call:
        case {"function": {"arguments": str(text)} as function}:
            with contextlib.suppress(UserError):  # what is no JSON stays a text
                arguments = parse_json(text, where)
                return call | {"function": function | {"arguments": arguments}}
    return call


def _render(template: ChatTemplate, messages: list[dict], **variables: Json) -> str:
    """What the template writes of the messages.

    Some templates read content only as one text, others only as a list of items, and most of these
    say nothing when they get the other. So the last user's text is looked for in what is written.
    """
    failure = None
    forms = [[_with_content(message, form) for message in messages] for form in (joined, _as_items)]
    for given in (messages, *(form for form in forms if form != messages)):
        try:
            text = template.render(messages=given, **variables)
        except TooMuch:
            raise
        except UserError as error:
            failure = failure or error
        else:
            if not _misread(text, given):
                return text
    if failure:
        raise failure
    return template.render(messages=messages, **variables)


def _with_content(message: dict[str, Json], form) -> dict[str, Json]:
    return message | {"content": form(message["content"])} if "content" in message else message


def _as_items(content: Json) -> Json:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _misread(text: str, messages: list[dict]) -> bool:
    contents = [message.get("content") for message in messages]
    if any(str(content) in text for content in contents if is_text_items(content) and content):
        return True  # a list as Python writes it
    said = [joined(message.get("content")) for message in messages if message["role"] == "user"]
    return bool(said) and isinstance(said[-1], str) and said[-1].strip() not in text


class _Shield:
    """Hides the names of special tokens in text: `over` puts it up, `off` takes it down.

    The first character of what is, or could be continued to be, a special token's name becomes one
    that is nowhere in the values. Nothing gets longer or shorter.
    """

    def __init__(self, specials: Iterable[str], values: Json) -> None:
        names = [name for name in specials if name]
        used = set(json.dumps(values, ensure_ascii=False))
        free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        self._mark = dict(zip(sorted({name[0] for name in names}), free, strict=False))
        self._begin = re.compile("|".join(sorted(set(_beginnings(names)))) or r"(?!)")

    def over(self, value: Json) -> Json:
        match value:
            case str():
                return self._begin.sub(lambda found: self._mark[found[0]], value)
            case list():
                return [self.over(item) for item in value]
            case dict():
                return {self.over(key): self.over(item) for key, item in value.items()}
        return value

    def off(self, text: str) -> str:
        for char, mark in self._mark.items():
            escaped = json.dumps(mark)[1:-1]  # as a template's tojson may write it
            text = text.replace(mark, char).replace(escaped, char)
        return text


def _beginnings(names: list[str]) -> Iterator[str]:
    """Patterns of the first character of each name where the second, or no more text, follows."""
    for name in names:
        first = re.escape(name[0])
        yield f"{first}(?={re.escape(name[1])})" if len(name) > 1 else first
        yield rf"{first}(?=\s*\Z)"
