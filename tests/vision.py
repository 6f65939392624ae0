"""Tiny multimodal models, their images, and what transformers computes of them.

Imports nothing of this project, so that `scripts/make_golden.py` can use it in the oracle's
environment.
"""

import dataclasses
import json
from typing import NamedTuple

import numpy as np

from tests import tiny

SIDE = 24
VISION = tiny.PUBLISHED_VISION | {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": SIDE,
    "patch_size": 4,
    "projector_input_dim": 48,
    "projector_output_dim": 48,
    "vision_output_dim": 48,
}
START, END, PATCH = 125, 126, 127  # as `tiny.nested` says
IMAGE, X_SEPARATOR, Y_SEPARATOR = 117, 118, 119
TEXT = 110  # tokens below are text


class Image(NamedTuple):
    """An image of so many rows and columns of tiles, whose pixels are drawn."""

    rows: int
    columns: int
    seed: int


def tokens_per_tile(vision):
    side = vision["image_size"] // vision["patch_size"]
    return round(side * vision["pixel_shuffle_ratio"]) ** 2


def num_tiles(image):
    count = image.rows * image.columns
    return count + (count > 1)


def tiles(image, side=SIDE):
    """The pixels of an image's tiles, uint8 [tiles, side, side, 3]."""
    rng = np.random.Generator(np.random.PCG64([image.seed, image.rows, image.columns]))
    return rng.integers(0, 256, (num_tiles(image), side, side, 3), dtype=np.uint8)


def image_tokens(image, each):
    """The tokens of an image, written down once more, beside the library's."""
    tile = [PATCH] * each
    if num_tiles(image) == 1:
        return [START, IMAGE, *tile, END]
    row = tile + (image.columns - 1) * [X_SEPARATOR, *tile] + [Y_SEPARATOR]
    return [START, *image.rows * row, IMAGE, *tile, END]


def prompt(parts, seed, each):
    """The tokens and the images of a prompt of numbers of text tokens and `Image`s."""
    rng = np.random.Generator(np.random.PCG64([seed, 7]))
    tokens, images = [], []
    for part in parts:
        if isinstance(part, int):
            tokens += rng.integers(0, TEXT, part).tolist()
        else:
            tokens += image_tokens(part, each)
            images.append(part)
    return tokens, images


def multimodal(text, vision=VISION, seed=0):
    """config.json and random weights of a text model's config with a vision tower."""
    outer, tensors = tiny.nested(text, tiny.random_tensors(text, seed))
    shapes = tiny.vision_shapes(vision, text["hidden_size"])
    rng = np.random.Generator(np.random.PCG64([seed, 3]))
    for name, shape in shapes.items():
        noise = tiny.random_tensor(rng, name, shape)
        noise = 0.5 * (noise - 1) if name.endswith(".bias") else noise
        tensors[name] = noise.astype(np.float32)
    return outer | {"vision_config": vision}, tensors


# Each image twice as a part of different prompts, so that features are found again.
ONE, TWO = Image(1, 1, 0), Image(2, 2, 1)
PROMPTS = {
    "text only": [30],
    "one tile": [5, ONE, 6],
    "two by two": [3, TWO, 4],
    "a row of 15": [2, Image(1, 15, 2), 5],
    "a column of 15": [2, Image(15, 1, 3), 5],
    "several images": [3, ONE, Image(2, 1, 4), 4],
    "images in several turns": [4, ONE, 9, TWO, 7, ONE, 5],
}


@dataclasses.dataclass(frozen=True)
class Golden:
    """What transformers computed in float32 for a tiny multimodal model and the `PROMPTS`.

    Attributes:
        config: the model's config.json.
        checksum: of its weights, which `multimodal` draws.
        features: [tiles, tokens, width] of the tiles of `TWO`, after the projector.
        logits: [prompt, kept, vocab], of the last tokens of each prompt.
        greedy: [prompt, new], the likeliest next tokens.
    """

    config: dict
    checksum: str
    features: np.ndarray
    logits: np.ndarray
    greedy: np.ndarray

    def tensors(self):
        """The weights, float32.

        Raises:
            AssertionError: NumPy no longer draws the numbers that the file was made with.
        """
        text = {k: v for k, v in self.config["text_config"].items()}
        _, tensors = multimodal(text, self.config["vision_config"])
        assert tiny.checksum(tensors) == self.checksum, "weights drifted: make the file again"
        return tensors

    def prompts(self):
        """By name the tokens and the images of each prompt."""
        each = tokens_per_tile(self.config["vision_config"])
        named = enumerate(PROMPTS.items())
        return {name: prompt(parts, seed, each) for seed, (name, parts) in named}


def read_golden(name):
    with np.load(tiny.GOLDEN / f"{name}.npz") as file:
        stored = {key: file[key] if file[key].ndim else file[key].item() for key in file.files}
    return Golden(**{**stored, "config": json.loads(stored["config"])})


def write_golden(name, golden):
    (tiny.GOLDEN / name).parent.mkdir(parents=True, exist_ok=True)
    fields = {**vars(golden), "config": json.dumps(golden.config)}
    np.savez_compressed(tiny.GOLDEN / f"{name}.npz", **fields)
