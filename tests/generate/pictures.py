"""A tiny model that sees, with random weights, and pictures to show it."""

import dataclasses
import functools

import jax
import numpy as np
from PIL import Image

from jaxmoe import Sampling
from jaxmoe.config import VisionConfig
from jaxmoe.hf_config import from_hf
from jaxmoe.images import ImageSettings, ImageTokens
from jaxmoe.model.params import init_params
from tests.generate.conftest import CONFIG
from tests.images.cases import TOKENS
from tests.small_tokenizers import CHAT, byte_tokenizer

TOKENIZER = byte_tokenizer([*CHAT, *TOKENS])
IDS = ImageTokens.of(TOKENIZER.specials)
VISION = VisionConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=24,
    patch_size=4,
    projector_input_dim=16,
    projector_output_dim=16,
    vision_output_dim=16,
)
MODEL = dataclasses.replace(
    from_hf(CONFIG | {"vocab_size": 320}, "tiny"), vision=VISION, image_token_id=IDS.patch
)
SETTINGS = ImageSettings.of(VISION)
GREEDY = Sampling(temperature=0.0, ignore_eos=True)


def noise(seed, width=24, height=24):
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))


SMALL, WIDE = noise(0), noise(1, width=48)


def user(*items):
    return [{"role": "user", "content": list(items)}]


@functools.cache
def random_params():
    """The model's parameters, on one device."""
    return init_params(MODEL, jax.random.key(0))
