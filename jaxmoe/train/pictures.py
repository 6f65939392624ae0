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
        pixels: of the tiles; what the conversations leave is black, and nobody reads its features.
    """

    tokens: Int32[np.ndarray, "rows length"]
    segment_ids: Int32[np.ndarray, "rows length"]
    learned: Bool[np.ndarray, "rows length"]
    pixels: UInt8[np.ndarray, "tiles side side 3"]


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
    return conversation_of(render_learned(messages, tokenizer, reader, images=images), reader)


def conversation_of(rendered: Learned, reader: PictureReader) -> Conversation:
    """A rendered conversation with the pixels of its pictures."""
    side = reader.settings.tile_size
    pixels = [np.zeros((0, side, side, 3), np.uint8)]
    pixels += [picture.tiles() for picture in rendered.prompt.pictures]
    tokens = np.array(rendered.prompt.tokens, np.int32)
    return Conversation(tokens, rendered.learned, np.concatenate(pixels))


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
    vision = vision_of(config)
    side, each = vision.image_size, vision.tokens_per_tile
    batch = PictureBatch(
        np.full((rows, length), config.pad_token_id, np.int32),
        np.zeros((rows, length), np.int32),
        np.zeros((rows, length), bool),
        np.zeros((tiles, side, side, 3), np.uint8),
    )
    used, shown = np.zeros(rows, int), 0
    for number, (tokens, learned, pixels) in enumerate(conversations, 1):
        row, end = int(np.argmax(used + len(tokens) <= length)), shown + len(pixels)
        if used[row] + len(tokens) > length or end > tiles:
            if number == 1:
                raise UserError(
                    f"a conversation has {len(tokens)} tokens and {len(pixels)} tiles, but a batch "
                    f"has room for {length} and {tiles}; give it more."
                )
            break
        place = row, slice(used[row], used[row] + len(tokens))
        numbers = np.arange(shown * each, end * each)
        batch.tokens[place] = with_references(config, tokens, numbers)
        batch.segment_ids[place] = number
        batch.learned[place] = learned
        batch.pixels[shown:end] = pixels
        used[row], shown = place[1].stop, end
    return batch
