"""Random multimodal models equal to transformers: features of tiles, and logits around images."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.eval.logits import token_logits
from jaxmoe.model.vision import tile_features
from tests import vision
from tests.conftest import load_tiny
from tests.images.drawn import drawn
from tests.oracle.draw import draw_config
from tests.oracle.test_oracle import SEED

pytestmark = pytest.mark.oracle

CONFIGS, TOLERANCE = 10, 1e-4


def draw(seed):
    """A config of a text model and of a tower, and a prompt with one to three images."""
    generator = np.random.Generator(np.random.PCG64([seed, 5]))

    def pick(*options):
        return options[generator.integers(len(options))]

    text = draw_config(generator)
    text |= {"num_experts_per_tok": text["num_local_experts"]}  # no choice that rounding decides
    heads, head_dim, patch, merged = pick(1, 2, 3, 4), pick(4, 8, 12, 20), pick(2, 3, 4), 2
    width, inner = heads * head_dim, pick(16, 24, 40)
    tower = vision.VISION | {
        "hidden_size": width,
        "num_hidden_layers": pick(1, 2, 3, 5),
        "num_attention_heads": heads,
        "intermediate_size": merged**2 * width,
        "image_size": patch * merged * pick(1, 2, 3, 5),
        "patch_size": patch,
        **dict.fromkeys(("projector_input_dim", "projector_output_dim"), inner),
        "vision_output_dim": inner,
        "rope_theta": pick(100, 10000),
    }
    shapes = [(1, 1), (2, 2), (1, 3), (4, 1), (1, 15)]
    images = [
        vision.Image(*shapes[generator.integers(len(shapes))], int(generator.integers(100)))
        for _ in range(generator.integers(1, 4))
    ]
    parts = [part for image in images for part in (int(generator.integers(1, 9)), image)]
    return text, tower, [*parts, int(generator.integers(1, 30))]


@pytest.mark.parametrize("seed", range(SEED, SEED + CONFIGS))
def test_images_equal_transformers(seed, ask_oracle, tmp_path):
    text, tower, parts = draw(seed)
    model = load_tiny(tmp_path, *vision.multimodal(text, tower, seed % 1000))
    tokens, images = vision.prompt(parts, seed % 1000, vision.tokens_per_tile(tower))
    side = tower["image_size"]
    tiles = [vision.tiles(image, side) for image in images]
    request = {"checkpoint": f"{model.checkpoint}/../hf", "tiles": str(tmp_path / "in.npz")}
    np.savez(request["tiles"], *tiles, tokens=tokens)
    ask_oracle(request | {"output": str(tmp_path / "out.npz")})
    theirs = np.load(tmp_path / "out.npz")

    pixels = jnp.asarray(np.concatenate(tiles))
    features = tile_features(model.config, model.params["vision"], pixels)
    assert abs(features - theirs["features"]).max() < TOLERANCE
    pictures = [drawn(image, side) for image in images]
    for chunk in (None, 7):
        logits = token_logits(
            model.config,
            model.params,
            np.array([tokens]),
            pictures=[pictures],
            prefill_chunk=chunk,
        )
        assert abs(logits[0] - theirs["logits"]).max() < TOLERANCE
