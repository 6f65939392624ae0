"""Pictures in messages and prompts: takes them out, and expands the tokens at their places."""

import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxmoe.errors import UserError
from jaxmoe.images import ImageTokens, Picture, PictureReader
from jaxmoe.images.reading import SOURCE_KEYS
from jaxmoe.images.tokens import check_places
from jaxmoe.text.messages import PICTURE, Json
from jaxmoe.text.tokenizer import Tokenizer

_TYPES = ("image", "image_url", "input_image")  # of content items that are pictures
_PLACE = re.compile(r"<image>|<\|image\|>")  # where a picture of a list beside the text belongs


class Prompt(NamedTuple):
    """A prompt as the model gets it.

    Attributes:
        tokens: with those of every picture at its place.
        pictures: in the order of the tokens.
    """

    tokens: list[int]
    pictures: tuple[Picture, ...] = ()


def text_prompt(
    texts: list[str],
    tokenizer: Tokenizer,
    reader: PictureReader | None,
    images: Json = (),
    parse_special: bool = False,
) -> Prompt:
    """A prompt of texts with pictures between them, after the begin-of-text token.

    Args:
        texts: one more than there are pictures; `split_places` splits one text.
        tokenizer: of the model.
        reader: opens pictures; None if the model has no vision tower.
        images: what they are opened from, as for `open_picture`.
        parse_special: whether names of special tokens in the texts become these tokens.

    Raises:
        UserError: if a picture cannot be used, or the numbers do not agree.
    """
    _check_list(images, "images")
    pictures = [_opened(reader, image, f"images[{i}]") for i, image in enumerate(images)]
    check_places(len(texts) - 1, len(pictures))
    tokens = tokenizer.encode(texts[0], bos=True, parse_special=parse_special)
    for picture, text in zip(pictures, texts[1:], strict=True):
        tokens += _layout(picture, tokenizer) + tokenizer.encode(text, parse_special=parse_special)
    return Prompt(tokens, tuple(pictures))


def split_places(text: str) -> list[str]:
    """The texts before, between and after the places for pictures that a text marks."""
    return _PLACE.split(text)


def token_prompt(
    tokens: list[int], tokenizer: Tokenizer | None, reader: PictureReader | None, images: Json
) -> Prompt:
    """Tokens with pictures: each `<|image|>` is expanded, unless there are `<|patch|>` already.

    Args:
        tokens: of the prompt, which get none in front.
        tokenizer: None if there is none; the tokens are those of expanded pictures then.
        reader, images: as for `text_prompt`.

    Raises:
        UserError: as `text_prompt`.
    """
    _check_list(images, "images")
    pictures = [_opened(reader, image, f"images[{i}]") for i, image in enumerate(images)]
    if tokenizer is None or not pictures:
        return Prompt(tokens, tuple(pictures))
    if ImageTokens.of(tokenizer.specials).patch in tokens:
        return Prompt(tokens, tuple(pictures))
    return expanded(tokens, pictures, tokenizer)


def expanded(tokens: list[int], pictures: list[Picture], tokenizer: Tokenizer) -> Prompt:
    """The prompt whose pictures are at the tokens `<|image|>`.

    Raises:
        UserError: if there are not as many of them as pictures, or the tokenizer lacks tokens.
    """
    if not pictures:
        return Prompt(tokens)
    grids = [picture.grid for picture in pictures]
    each = pictures[0].settings.tokens_per_tile
    found = ImageTokens.of(tokenizer.specials).expand(tokens, grids, each)
    return Prompt(found, tuple(pictures))


def take_pictures(
    messages: Json, reader: PictureReader | None, images: Json = None
) -> tuple[Json, list[Picture]]:
    """The messages with `PICTURE` in place of each picture, and the pictures, first to last.

    Args:
        messages: whose content may be a list of items, some of them pictures; or a text with
            `<image>` where each picture of a list `images` of the message belongs.
        reader: opens pictures; None if the model has no vision tower.
        images: pictures of a list beside all messages, whose places they mark in the same way.

    Raises:
        UserError: if a picture cannot be used, or there are not as many places as pictures.
    """
    if not isinstance(messages, list):
        return messages, []
    placed = [_with_own(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if images is not None:
        placed = _with_images(placed, images, "images")
    pictures: list[Picture] = []
    taken = [_taken(x, reader, f"messages[{i}]", pictures) for i, x in enumerate(placed)]
    return taken, pictures


def _with_own(message: Json, where: str) -> Json:
    """A message with the pictures of its own list `images` at their places."""
    if not isinstance(message, dict) or "images" not in message:
        return message
    rest = {key: value for key, value in message.items() if key != "images"}
    if message["images"] is None:
        return rest
    try:
        return _with_images([rest], message["images"], "images")[0]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _with_images(messages: list[Json], images: Json, where: str) -> list[Json]:
    """Messages with pictures of a list at the places that they mark.

    Raises:
        UserError: if there are not as many places as pictures.
    """
    _check_list(images, where)
    split = [_split(message) for message in messages]
    check_places(sum(map(_is_place, itertools.chain(*split))), len(images))
    left = iter(images)
    return [
        message | {"content": _filled(items, left)} if any(map(_is_place, items)) else message
        for message, items in zip(messages, split, strict=True)
    ]


def _split(message: Json) -> list[Json]:
    """The content of a message as items, with a place for each picture that its texts mark."""
    content = message.get("content") if isinstance(message, dict) else None
    items: list[Json] = []
    for item in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        if not _is_text(item) or not isinstance(item.get("text"), str):
            items.append(item)
            continue
        for i, text in enumerate(split_places(item["text"])):
            items += [PICTURE] if i else []
            items += [{"type": "text", "text": text}] if text else []
    return items


def _filled(items: list[Json], images: Iterator[Any]) -> list[Json]:
    return [PICTURE | {"image": next(images)} if _is_place(item) else item for item in items]


def _is_text(item: Json) -> bool:
    return isinstance(item, dict) and item.get("type") in ("text", "input_text")


def _is_picture(item: Json) -> bool:
    return isinstance(item, dict) and item.get("type") in _TYPES


def _is_place(item: Json) -> bool:
    """Whether an item is a picture of which nothing says where it comes from."""
    return _is_picture(item) and all(item.get(key) is None for key in SOURCE_KEYS)


def _taken(message: Json, reader: PictureReader | None, where: str, pictures: list) -> Json:
    """A message without its pictures, which are added to a list."""
    content: Json = message.get("content") if isinstance(message, dict) else None
    items: Json = [content] if _is_picture(content) else content
    if not isinstance(items, list) or not any(_is_picture(x) or _is_text(x) for x in items):
        return message
    taken: list[Json] = []
    for i, item in enumerate(items):
        if _is_picture(item):
            pictures.append(_opened(reader, item, f"{where}.content[{i}]"))
            taken.append(PICTURE)
        else:
            taken.append(item | {"type": "text"} if _is_text(item) else item)
    return message | {"content": taken}


def _opened(reader: PictureReader | None, source: Any, where: str) -> Picture:
    if reader is None:
        raise UserError(
            f"{where} is a picture, and there is no vision tower to see it; send only text"
        )
    return reader.open(source, where)


def _layout(picture: Picture, tokenizer: Tokenizer) -> list[int]:
    ids = ImageTokens.of(tokenizer.specials)
    return ids.layout(picture.grid, picture.settings.tokens_per_tile)


def _check_list(images: Any, where: str) -> None:
    if not isinstance(images, list | tuple):
        raise UserError(f"{where} is no list of pictures; write it as one")
