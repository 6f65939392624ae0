"""Trains the demo model that sees: first the tower alone on small pictures, then all of it."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from demo.vision import digit_pictures
from demo.vision.digit_pictures import Drawing
from jaxmoe.config import Llama4Config, vision_of
from jaxmoe.images import ImageSettings, PictureReader
from jaxmoe.images.tiles import cut
from jaxmoe.model.layers import rms_norm
from jaxmoe.model.transformer import unembed
from jaxmoe.model.vision import tile_features
from jaxmoe.text import Tokenizer
from jaxmoe.train import trainer
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.loss import picture_loss
from jaxmoe.train.pictures import Conversation, PictureBatch, pack, read_conversation

TOWER_STEPS = 1000  # in which each feature is to be the digit that it sees
SMALL_TILES = 48  # of a batch of those
ROWS, LENGTH, TILES = 4, 192, 32  # of a batch of conversations
FIRST_LAYOUTS = 3  # that conversations are about for some steps
EASY_STEPS = 150
HELD_OUT = 8  # batches that the records of training are measured on
Record = dict[str, Any]


class TileBatch(NamedTuple):
    """Pictures of one tile.

    Attributes:
        tokens: [tiles, tokens of a tile], the digit that each feature sees; -1 for none.
        pixels: [tiles, side, side, 3].
    """

    tokens: np.ndarray
    pixels: np.ndarray


def tile_batch(
    settings: ImageSettings, tokenizer: Tokenizer, rng: np.random.Generator
) -> TileBatch:
    """Drawn pictures of one tile: half of them of one digit, the others of several."""
    source = digit_pictures.digits(held_out=False)
    small = [layout for layout in digit_pictures.LAYOUTS if max(layout) < 3]
    tokens, pixels = [], []
    for i in range(SMALL_TILES):
        layout = small[0 if i % 2 else rng.integers(1, len(small))]
        drawing = digit_pictures.draw(rng, source, layout, one_tile=True)
        tokens.append(seen_by_features(drawing, tokenizer))
        pixels.append(cut(drawing.image, settings)[1][0])
    return TileBatch(np.stack(tokens), np.stack(pixels))


def seen_by_features(drawing: Drawing, tokenizer: Tokenizer) -> np.ndarray:
    """The token of the digit in each quarter of a picture of one tile; -1 where there is none."""
    quarters = np.full((2, 2), -1, np.int32)
    digits = [[tokenizer.encode(str(digit))[0] for digit in row] for row in drawing.rows]
    quarters[: len(digits), : len(digits[0])] = digits
    return (quarters if np.size(digits) > 1 else np.full((2, 2), digits[0][0], np.int32)).ravel()


def tower_loss(model: Llama4Config, params: dict, batch: TileBatch):
    """Cross entropy of each feature's digit, read out as the text model's last layer is."""
    tokens, pixels = map(jnp.asarray, batch)
    features = tile_features(model, params["vision"], pixels)
    logits = unembed(model, params, rms_norm(features, params["norm"], model.rms_norm_eps))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(tokens, 0)[..., None], -1)
    loss = -jnp.mean(chosen[..., 0], where=tokens >= 0)
    right = jnp.mean(jnp.argmax(logits, -1) == tokens, where=tokens >= 0)
    return loss, {"loss": loss, "right": right}


def conversations(
    settings: ImageSettings, tokenizer: Tokenizer, rng: np.random.Generator, held_out: bool, layouts
) -> Iterator[Conversation]:
    """Conversations about drawn pictures, without end."""
    source = digit_pictures.digits(held_out)
    while True:
        drawing = digit_pictures.draw_any(rng, source, layouts)
        messages = digit_pictures.ask(rng, drawing)
        yield read_conversation(messages, tokenizer, PictureReader(settings))


def batch(
    model: Llama4Config, tokenizer: Tokenizer, seed: int, step: int, held_out: bool = False
) -> PictureBatch | TileBatch:
    """The batch of one step, which follows from the seed and the step alone."""
    rng, settings = (
        np.random.default_rng((seed, step, held_out)),
        ImageSettings.of(vision_of(model)),
    )
    if step < TOWER_STEPS and not held_out:
        return tile_batch(settings, tokenizer, rng)
    easy = step < TOWER_STEPS + EASY_STEPS and not held_out
    layouts = digit_pictures.LAYOUTS[: FIRST_LAYOUTS if easy else None]
    drawn = conversations(settings, tokenizer, rng, held_out, layouts)
    return pack(model, drawn, rows=ROWS, length=LENGTH, tiles=TILES)


def make_loss(config: TrainConfig) -> Callable:
    """The loss of either kind of batch."""
    of_conversations = picture_loss(config.router_loss, config.remat)

    def loss(model: Llama4Config, params: dict, batch: PictureBatch | TileBatch):
        if isinstance(batch, TileBatch):
            return tower_loss(model, params, batch)
        return of_conversations(model, params, batch)

    return loss


def train(
    config: TrainConfig, model: Llama4Config, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> Iterator[Record]:
    """Trains, or goes on where a run was killed; yields records of metrics."""
    batches, loss = functools.partial(batch, model, tokenizer, config.seed), make_loss(config)
    held_out = [batches(i, held_out=True) for i in range(HELD_OUT)]
    measure = jax.jit(functools.partial(loss, model))

    def evaluate(params: dict) -> Record:
        found = [measure(params, rows)[1] for rows in held_out]
        names = {"held_out_loss": "loss", "held_out_right": "right"}
        return {new: float(np.mean([x[name] for x in found])) for new, name in names.items()}

    return trainer.train(config, mesh, loss=loss, batches=batches, evaluate=evaluate)
