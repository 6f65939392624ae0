"""Pairs of answers about pictures, which both share."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmoe.checkpoint import store
from jaxmoe.errors import UserError
from jaxmoe.images import PictureReader, read_image_settings
from jaxmoe.train.batches import training_data
from jaxmoe.train.config import AdapterConfig, DataConfig, OptimizerConfig, PreferenceConfig
from jaxmoe.train.pictures import read_conversation
from jaxmoe.train.preferences import PreferenceBatch, preference_loss
from jaxmoe.train.state import random_params
from jaxmoe.train.trainer import set_up, train
from tests.conftest import one_device
from tests.train.test_data_pictures import row
from tests.train.test_pictures import CONFIG, TOKENIZER, run_config
from tests.train.test_preference_runs import LN_2

EACH = CONFIG.vision.tokens_per_tile
ANSWERS = [("yes", "no no"), ("a", "bc"), ("abc", "d"), ("it is", "is it")]


def says(text):
    return [{"role": "assistant", "content": text}]


def pair(folder, number, size):
    """A prompt, about a picture of so many tiles if it has a size, and two answers."""
    drawn, (chosen, rejected) = row(folder, number, size), ANSWERS[number]
    asked = {"prompt": drawn["messages"][:1], "chosen": says(chosen), "rejected": says(rejected)}
    return asked | {"images": drawn.get("images")}


@pytest.fixture
def rows(tmp_path):
    return [pair(tmp_path, i, size) for i, size in enumerate([(1, 1), (1, 2), None, (1, 1)])]


@pytest.fixture
def config(tmp_path, rows):
    TOKENIZER.save(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = (str(tmp_path / "pairs.jsonl"),)
    data = DataConfig(files=files, length=384, batch_size=1, tiles=10)
    options = {"optimizer": OptimizerConfig(peak_lr=0.01, warmup_steps=0)}
    return run_config(
        tmp_path / "run",
        data=data,
        tokenizer=str(tmp_path),
        steps=2,
        preference=PreferenceConfig(),
        **options,
    )


def by_hand(rows, batch, folder):
    """A batch of the same pairs in which both answers have copies of the prompt's pictures."""
    reader = PictureReader(read_image_settings(folder, CONFIG.vision), folder)
    found = PreferenceBatch(*(None if x is None else np.zeros_like(x) for x in batch))
    used, shown = 0, 0
    for i, document in enumerate(batch.document[0]):
        for j, name in enumerate(("chosen", "rejected")):
            messages = rows[document]["prompt"] + rows[document][name]
            talk = read_conversation(messages, TOKENIZER, reader, rows[document]["images"])
            place, tiles = slice(used, used + len(talk.tokens)), len(talk.pixels)
            own = found.tokens[0, place]
            own[:] = talk.tokens
            features = CONFIG.vocab_size + np.arange(shown * EACH, (shown + tiles) * EACH)
            own[own == CONFIG.image_token_id] = features
            found.learned[0, place] = talk.learned
            found.segment_ids[0, place] = 2 * i + j + 1
            found.pixels[shown : shown + tiles] = talk.pixels
            used, shown = used + len(talk.tokens), shown + tiles
    return found._replace(document=batch.document, reference=batch.reference)


@pytest.fixture
def params():
    with jax.set_mesh(one_device()):
        return random_params(CONFIG, one_device(), seed=3)


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def value(params, batch):
    return preference_loss(PreferenceConfig(sft_loss=0.5))(CONFIG, params, batch)


def test_both_answers_share_the_pictures_of_their_prompt(config, rows, params, tmp_path):
    """The loss and its gradients are those of pictures that each answer has to itself."""
    batch = training_data(config, CONFIG).batches(0)
    assert sorted(batch.document[0]) == [0, 1, 2, 3]
    used = np.unique((batch.tokens[batch.tokens >= CONFIG.vocab_size] - CONFIG.vocab_size) // EACH)
    np.testing.assert_array_equal(used, np.arange(1 + 3 + 1))  # two tiles and the whole picture
    assert len(batch.pixels) == 10 and not batch.pixels[5:].any()
    reference = np.random.default_rng(0).normal(-20, 3, (1, 4, 2)).astype(np.float32)
    batch = batch._replace(reference=reference)
    with jax.set_mesh(one_device()):
        (shared, _), ours = value(params, batch)
        (apart, _), theirs = value(params, by_hand(rows, batch, tmp_path))
    np.testing.assert_allclose(shared, apart, rtol=1e-6)
    assert np.any(ours["vision"]["projector"])
    for mine, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-6)


def test_saved_references_saw_the_pictures(config, params):
    """Catches references without pictures, where the whole model is trained and with the tower."""
    with jax.set_mesh(one_device()):
        setup = set_up(config, CONFIG, one_device(), "test", init=params)
        Path(config.output).mkdir(exist_ok=True)
        setup.references.fill(lambda: params, begun=False)
        _, found = value(params, setup.batches(0))[0]
    assert float(found["loss"]) == pytest.approx(LN_2, abs=1e-6)
    assert setup.trainable("vision.projector") and setup.trainable("embed")
    frozen = dataclasses.replace(config, train_vision=False)
    kept = set_up(frozen, CONFIG, one_device(), "test", init=params).trainable
    assert kept("embed") and not kept("vision.projector")


@pytest.mark.slow
def test_adapters_of_the_tower_begin_at_ln_2(config, params, tmp_path):
    """After a step the reference, whose features are without them, differs."""
    adapter, folder = AdapterConfig(rank=4, targets=("vision.projector",)), tmp_path / "checkpoint"
    config = dataclasses.replace(config, adapter=adapter, model={}, init=str(folder))
    with jax.set_mesh(one_device()):
        store.save(folder, CONFIG, params)
        first, second = train(config, one_device())
    assert first["loss"] == LN_2 and first["rewards/margins"] == 0
    assert second["loss"] < LN_2 and second["rewards/margins"] > 0


def test_answers_that_show_different_pictures_are_refused(config, rows, tmp_path):
    other = pair(tmp_path, 1, (1, 1)) | {"images": None}
    for i, name in enumerate(("chosen", "rejected")):
        shown = {"type": "image", "image": f"{i}.png"}
        asked = {"role": "user", "content": [shown, {"type": "text", "text": "So?"}]}
        other[name] = [*says("What?"), asked, *says("Oh")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [rows[0], other])))
    with pytest.raises(UserError, match=r"line 2: its 'chosen' and 'rejected' show different pict"):
        training_data(config, CONFIG)
