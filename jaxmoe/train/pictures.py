"""Conversations with pictures as training batches: packed rows of tokens, and tiles of pixels."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation.features import vision_of, with_references
from jaxmoe.images import PictureReader
from jaxmoe.text import Learned, Tokenizer, render_learned

type Json = Any  # a value from a JSON file


class Conversation(NamedTuple):
    """A text to learn from, with its pictures.

    Attributes:
        tokens: with the image token at each place of a feature.
        learned: the tokens that the loss counts.
        pixels: of the tiles, in the order of their features.
    """

    tokens: Int32[np.ndarray, "tokens"]
    learned: Bool[np.ndarray, "tokens"]
    pixels: UInt8[np.ndarray, "tiles side side 3"]


class PictureBatch(NamedTuple):
    """What `picture_loss` takes.

    Attributes:
        tokens: `vocab_size + i` at the place of feature i of the batch's tiles.
        segment_ids: the conversation that a token of a row belongs to; 0 is padding.
        learned: the tokens that the loss counts.
        pixels: of the tiles; after those of the conversations, black ones that no token refers to.
        source: which of several sources each token is of; None of one.
    """

    tokens: Int32[np.ndarray, "rows length"]
    segment_ids: Int32[np.ndarray, "rows length"]
    learned: Bool[np.ndarray, "rows length"]
    pixels: UInt8[np.ndarray, "tiles side side 3"]
    source: Int32[np.ndarray, "rows length"] | None = None


def read_conversation(
    messages: Json, tokenizer: Tokenizer, reader: PictureReader, images: Json = None
) -> Conversation:
    """The conversation of messages, of which what the assistant says is learned.

    Args:
        messages: as for `jaxmoe.text.render_chat`.
        tokenizer: with the special tokens of Llama 4.
        reader: opens the pictures.
        images: a list of pictures whose places the texts of all messages mark.

    Raises:
        UserError: if a message or a picture cannot be used.
    """
    rendered = render_learned(messages, tokenizer, reader, images=images)
    return conversation_of(rendered, reader.settings.tile_size)


def conversation_of(rendered: Learned, side: int) -> Conversation:
    """A rendered conversation with the pixels of its pictures, in tiles of `side` pixels."""
    pixels = [no_tiles(side), *(picture.tiles() for picture in rendered.prompt.pictures)]
    tokens = np.array(rendered.prompt.tokens, np.int32)
    return Conversation(tokens, rendered.learned, np.concatenate(pixels))


def no_tiles(side: int) -> UInt8[np.ndarray, "tiles side side 3"]:
    """The pixels of a conversation without pictures."""
    return np.zeros((0, side, side, 3), np.uint8)


def pack(
    config: Llama4Config,
    conversations: Iterable[Conversation],
    *,
    rows: int,
    length: int,
    tiles: int,
) -> PictureBatch:
    """A batch of the first conversations, as many as there is room for.

    Each goes into the first row that has room. The first one for which there is none, or no tiles,
    is left out, with all after it.

    Args:
        config: of a model with a vision tower.
        rows, length, tiles: the sizes of the batch, which a compiled step needs always the same.

    Raises:
        UserError: if the first conversation is larger than that.
    """
    batch = _empty(config, rows, length, tiles)
    used, shown = np.zeros(rows, int), 0
    for number, conversation in enumerate(conversations, 1):
        tokens, _, pixels = conversation
        row, end = int(np.argmax(used + len(tokens) <= length)), shown + len(pixels)
        if used[row] + len(tokens) > length or end > tiles:
            if number == 1:
                raise UserError(
                    f"a conversation has {len(tokens)} tokens and {len(pixels)} tiles, but a batch "
                    f"has room for {length} and {tiles}; give it more."
                )
            break
        _put(batch, conversation, config, number, row, int(used[row]), shown)
        used[row], shown = used[row] + len(tokens), end
    return batch


def picture_batch(
    config: Llama4Config, rows: Sequence[Sequence[Conversation]], *, length: int, tiles: int
) -> PictureBatch:
    """A batch of rows that are planned already.

    Args:
        config: of a model with a vision tower.
        rows: the conversations of each, of at most `length` tokens.
        length: of a row.
        tiles: of the batch, at least those of all conversations.
    """
    batch = _empty(config, len(rows), length, tiles)
    number, shown = 0, 0
    for row, conversations in enumerate(rows):
        used = 0
        for conversation in conversations:
            number += 1
            _put(batch, conversation, config, number, row, used, shown)
            used += len(conversation.tokens)
            shown += len(conversation.pixels)
    return batch


def _empty(config: Llama4Config, rows: int, length: int, tiles: int) -> PictureBatch:
    side = vision_of(config).image_size
    return PictureBatch(
        np.full((rows, length), config.pad_token_id, np.int32),
        np.zeros((rows, length), np.int32),
        np.zeros((rows, length), bool),
        np.zeros((tiles, side, side, 3), np.uint8),
    )


def _put(
    batch: PictureBatch,
    conversation: Conversation,
    config: Llama4Config,
    number: int,
    row: int,
    start: int,
    shown: int,
) -> None:
    """Writes a conversation into a batch, from a place of a row and behind the tiles shown."""
    tokens, learned, pixels = conversation
    each, end = vision_of(config).tokens_per_tile, shown + len(pixels)
    place = row, slice(start, start + len(tokens))
    batch.tokens[place] = with_references(config, tokens, np.arange(shown * each, end * each))
    batch.segment_ids[place] = number
    batch.learned[place] = learned
    batch.pixels[shown:end] = pixels
