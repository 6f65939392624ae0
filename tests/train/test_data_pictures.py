"""Runs on rows with pictures, as a config says."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from jaxmoe.checkpoint import store
from jaxmoe.errors import UserError
from jaxmoe.images import PictureReader, read_image_settings
from jaxmoe.train.batches import training_data
from jaxmoe.train.config import DataConfig
from jaxmoe.train.pictures import read_conversation
from jaxmoe.train.state import random_params
from jaxmoe.train.trainer import train
from tests import vision
from tests.conftest import one_device
from tests.train.test_pictures import CONFIG, TOKENIZER, run_config

SIZES = [(1, 1), (1, 2), None, (1, 1), (2, 1), None]  # tiles of the pictures of each row


def row(folder, number, size):
    """A conversation, about a picture if it has a size."""
    question = {"role": "user", "content": f"<image>{number}?" if size else f"{number}?"}
    found = {"messages": [question, {"role": "assistant", "content": "yes"}]}
    if size is None:
        return found
    shape = size[0] * vision.SIDE, size[1] * vision.SIDE, 3
    pixels = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.png")
    return found | {"images": [f"{number}.png"]}


@pytest.fixture
def rows(tmp_path):
    return [row(tmp_path, number, size) for number, size in enumerate(SIZES)]


@pytest.fixture
def config(tmp_path, rows):
    TOKENIZER.save(tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(files=(str(path),), length=256, batch_size=2, held_out_every=6)
    return run_config(tmp_path / "run", data=data, tokenizer=str(tmp_path), steps=2)


def test_a_batch_has_the_conversations_of_the_rows_and_their_pixels(config, rows, tmp_path):
    data = training_data(config, CONFIG)
    batch = data.batches(0)
    reader = PictureReader(read_image_settings(tmp_path, CONFIG.vision), tmp_path)
    expected = [read_conversation(r["messages"], TOKENIZER, reader, r.get("images")) for r in rows]
    expected = {talk.tokens.tobytes(): talk for talk in expected[:5]}
    assert len(batch.pixels) == 2 * (256 // CONFIG.vision.tokens_per_tile)
    seen = set()
    for ids, tokens, learned in zip(batch.segment_ids, batch.tokens, batch.learned, strict=True):
        for number in set(ids) - {0}:
            mine = tokens[ids == number]
            is_feature = mine >= CONFIG.vocab_size
            plain = np.where(is_feature, CONFIG.image_token_id, mine)
            talk = expected[plain.tobytes()]
            seen.add(plain.tobytes())
            np.testing.assert_array_equal(learned[ids == number], talk.learned)
            tiles = np.unique((mine[is_feature] - CONFIG.vocab_size) // 9)
            np.testing.assert_array_equal(batch.pixels[tiles], talk.pixels)
    assert seen == set(expected)


@pytest.mark.slow
@pytest.mark.parametrize("train_vision", [True, False])
def test_a_config_trains_on_pictures_with_the_tower_or_without(config, train_vision):
    mesh = one_device()
    with jax.set_mesh(mesh):
        init = random_params(CONFIG, mesh, seed=1)
        records = list(
            train(dataclasses.replace(config, train_vision=train_vision), mesh, init=init)
        )
    assert "right" in records[-1] and 0 < records[-1]["held_out_loss"] < 10
    trained = store.load(f"{config.output}/checkpoint", mesh)[1]["vision"]["projector"]
    assert (trained != init["vision"]["projector"]).any() == train_vision


def test_rows_have_room_for_the_tiles_that_are_asked_for(config):
    few = dataclasses.replace(config, data=dataclasses.replace(config.data, tiles=3))
    batches = [training_data(few, CONFIG).batches(step) for step in range(4)]
    assert all(len(batch.pixels) == 6 for batch in batches)
    for batch in batches:
        for tokens in batch.tokens:
            assert (tokens >= CONFIG.vocab_size).sum() <= 3 * 9
    fewer = dataclasses.replace(config, data=dataclasses.replace(config.data, tiles=2))
    with pytest.raises(UserError, match=r"2 of 6 documents are longer .* tokens and 3 tiles"):
        training_data(fewer, CONFIG)


def test_a_bad_picture_names_its_line(config, tmp_path):
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"rows\.jsonl line 2: .*1\.png"):
        training_data(config, CONFIG)
