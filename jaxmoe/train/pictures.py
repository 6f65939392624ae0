"""Conversations with pictures as training batches: packed rows of tokens, and tiles of pixels."""

from collections.abc import Iterable
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
    tokens = np.array(rendered.prompt.tokens, np.int32)
    return Conversation(tokens, rendered.learned, pixels_of(rendered, side))


def pixels_of(rendered: Learned, side: int) -> UInt8[np.ndarray, "tiles side side 3"]:
    """The pixels of a rendered conversation's pictures, in tiles of `side` pixels."""
    pixels = [black_tiles(0, side), *(picture.tiles() for picture in rendered.prompt.pictures)]
    return np.concatenate(pixels)


def black_tiles(count: int, side: int) -> UInt8[np.ndarray, "tiles side side 3"]:
    """Tiles that no token refers to."""
    return np.zeros((count, side, side, 3), np.uint8)


def with_tiles(
    config: Llama4Config, tokens: Int32[np.ndarray, "tokens"], start: int, stop: int
) -> Int32[np.ndarray, "tokens"]:
    """The tokens with references to the features of a batch's tiles from `start` up to `stop`.

    Tokens that show the tiles several times, as a pair of answers does, refer to them each time.
    """
    each = vision_of(config).tokens_per_tile
    features = np.arange(start * each, stop * each)
    places = np.count_nonzero(tokens == config.image_token_id)
    times = places // len(features) if len(features) else 0
    return with_references(config, tokens, np.tile(features, times))


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


def _empty(config: Llama4Config, rows: int, length: int, tiles: int) -> PictureBatch:
    return PictureBatch(
        np.full((rows, length), config.pad_token_id, np.int32),
        np.zeros((rows, length), np.int32),
        np.zeros((rows, length), bool),
        black_tiles(tiles, vision_of(config).image_size),
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
    end = shown + len(pixels)
    place = row, slice(start, start + len(tokens))
    batch.tokens[place] = with_tiles(config, tokens, shown, end)
    batch.segment_ids[place] = number
    batch.learned[place] = learned
    batch.pixels[shown:end] = pixels
