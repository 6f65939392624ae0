"""What transformers computes for tiny multimodal models: tests/golden/vision/*.npz."""

import tempfile

import numpy as np
import torch

from tests import tiny, vision
from tests.oracle import hf_logits, hf_vision

KEPT = 16  # tokens of each prompt whose logits are kept
NEW = 8  # tokens that are written after each
LIKE = {"vision/scout": tiny.scout_like, "vision/maverick": tiny.maverick_like}


def compute(name):
    """The `vision.Golden` of a case.

    Raises:
        ValueError: two next tokens nearly tie.
    """
    text = LIKE[name](num_hidden_layers=4, attention_chunk_size=16)
    config, tensors = vision.multimodal(text)
    with tempfile.TemporaryDirectory() as folder:
        model = hf_logits.load(tiny.write_checkpoint(folder, config, tensors))
    golden = vision.Golden(config, tiny.checksum(tensors), *3 * (np.zeros(0),))
    logits, greedy = [], []
    for tokens, images in golden.prompts().values():
        tiles = [vision.tiles(image) for image in images]
        found = hf_vision.logits(model, tokens, tiles)
        written, gap = hf_vision.greedy(model, tokens, tiles, NEW)
        if gap < 1e-3:
            raise ValueError("two next tokens nearly tie: choose another seed")
        logits.append(found[-KEPT:])
        greedy.append(written)
    with torch.inference_mode():
        features = hf_vision.features(model, vision.tiles(vision.TWO))
    return vision.Golden(
        config, tiny.checksum(tensors), features, np.stack(logits), np.array(greedy, np.int32)
    )
