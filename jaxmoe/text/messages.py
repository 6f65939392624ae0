"""What all chat formats share: checks of messages, and the text of their content."""

import json
from collections.abc import Iterator
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.images.tokens import IMAGE
from jaxmoe.text.tokenizer import Tokenizer

type Json = Any  # a value from a JSON file

PICTURE = {"type": "image"}  # the content item of a picture once it is taken out of a message

_PRIVATE = range(0xE000, 0xF900)  # Unicode's private-use code points


def check_messages(messages: Json) -> None:
    """Raises a UserError unless `messages` is a list of at least one."""
    if not isinstance(messages, list) or not messages:
        raise UserError("messages is not a list of at least one message; write it as one")


def check_tools(tools: Json) -> None:
    """Raises a UserError unless `tools` is a list of objects."""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError("tools is not a list of JSON objects; describe each function by one object")


def is_text_items(content: Json) -> bool:
    """Whether content is a list of `{"type": "text", "text": ...}`."""
    return isinstance(content, list) and all(_text_of(item) is not None for item in content)


def joined(content: Json, picture: str | None = None) -> Json:
    """The text of a list of text items; any other content unchanged.

    Args:
        content: of a message.
        picture: what stands in the text for a picture; None if a list with one is unchanged, too.
    """
    if not isinstance(content, list):
        return content
    texts = [picture if item == PICTURE else _text_of(item) for item in content]
    known = [text for text in texts if text is not None]
    return "".join(known) if len(known) == len(texts) else content


def unused_characters(value: Json) -> Iterator[str]:
    """Private-use characters of Unicode that no text in a JSON value has, nor their JSON escapes.

    Raises:
        UserError: if more of them are asked for than there are.
    """
    text = json.dumps(value, ensure_ascii=False)
    used = set(text)
    for char in map(chr, _PRIVATE):
        if char not in used and escape_in_json(char) not in text:
            yield char
    raise UserError("the messages have all private-use characters of Unicode; remove some")


def escape_in_json(char: str) -> str:
    """What JSON in ASCII writes for a character."""
    return json.dumps(char)[1:-1]


def encode_marked(text: str, picture: str | None, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text, with `<|image|>` for each character `picture` in it."""
    first, *others = text.split(picture) if picture else [text]
    ids = tokenizer.encode(first)
    for other in others:
        ids += [tokenizer.special(IMAGE), *tokenizer.encode(other)]
    return ids


def _text_of(item: Json) -> str | None:
    match item:
        case {"type": "text", "text": str(text)}:
            return text
    return None
