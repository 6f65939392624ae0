"""Checks of messages that all chat formats share."""

from typing import Any

from jaxmoe.errors import UserError

type Json = Any  # a value from a JSON file


def check_messages(messages: Json) -> None:
    """Raises a UserError unless `messages` is a list of at least one, and none has an image."""
    if not isinstance(messages, list) or not messages:
        raise UserError("messages is not a list of at least one message; write it as one")
    for index, message in enumerate(messages):
        if isinstance(message, dict):
            _refuse_images(message.get("content"), f"messages[{index}]")


def check_tools(tools: Json) -> None:
    """Raises a UserError unless `tools` is a list of objects."""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError("tools is not a list of JSON objects; describe each function by one object")


def is_text_items(content: Json) -> bool:
    """Whether content is a list of `{"type": "text", "text": ...}`."""
    return isinstance(content, list) and all(map(_is_text_item, content))


def joined(content: Json) -> Json:
    """The text of a list of text items; any other content unchanged."""
    return "".join(item["text"] for item in content) if is_text_items(content) else content


def _is_text_item(item: Json) -> bool:
    match item:
        case {"type": "text", "text": str()}:
            return True
    return False


def _refuse_images(content: Json, where: str) -> None:
    items = content if isinstance(content, list) else [content]
    if any(isinstance(item, dict) and "image" in str(item.get("type")) for item in items):
        raise UserError(f"{where} holds an image; images are not supported yet, so send only text")
