"""Whole runs of a tiny model: what stops them, and what they begin with."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jaxmoe.checkpoint import store
from jaxmoe.errors import UserError
from jaxmoe.train import data, trainer
from jaxmoe.train.config import DataConfig, OptimizerConfig, TrainConfig
from jaxmoe.train.loss import next_token_loss
from tests import tiny
from tests.conftest import one_device

pytestmark = pytest.mark.usefixtures("compile_once")

MODEL = tiny.scout_like(num_hidden_layers=1, hidden_size=16, intermediate_size=16, bos_token_id=0)
BAD = 99  # a token at which the loss is made NaN


@pytest.fixture
def config(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(800) % 90)
    return TrainConfig(
        model=MODEL,
        data=DataConfig(tokens=str(tmp_path / "tokens.npy"), length=8, batch_size=2),
        optimizer=OptimizerConfig(peak_lr=0.01, warmup_steps=1),
        output=str(tmp_path / "run"),
        steps=1,
        log_every=1,
    )


def run(config, **functions):
    mesh = one_device()
    with jax.set_mesh(mesh):
        return list(trainer.train(config, mesh, "run.yaml", **functions))


def with_bad_token(config, step):
    """The config with a file whose batch of a step, counted from 0, is the first with `BAD`."""
    tokens = np.arange(800)
    sizes = dict(length=8, rows=2, seed=config.seed)
    row = data.training_batch(tokens, 0, **sizes, step=step).tokens[0]
    marked = np.where(tokens == row[3], BAD, tokens % 90)
    np.save(config.data.tokens, marked)
    return dataclasses.replace(config, steps=step + 5)


def bad_loss(model, params, batch):
    total, metrics = next_token_loss()(model, params, batch)
    return total * jnp.where(jnp.any(batch.tokens == BAD), jnp.nan, 1.0), metrics


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(config):
    config = with_bad_token(config, step=3)
    folder = Path(config.output)
    for _ in range(2):  # running it again fails at once, at the same step
        with pytest.raises(UserError, match=r"run\.yaml: the loss .* at step 4; .* after step 3"):
            run(config, loss=bad_loss)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        assert [record["step"] for record in records] == [1, 2, 3]
        assert "NaN" not in (folder / "metrics.jsonl").read_text()
        assert [path.name for path in (folder / "states").iterdir()] == ["3"]
        state = ocp.load(folder / "states" / "3")
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
        assert not (folder / "checkpoint").exists()


def test_a_held_out_loss_that_is_not_finite_stops_the_run(config, monkeypatch):
    monkeypatch.setattr(trainer, "held_out_loss", lambda *_, **__: {"held_out_loss": np.inf * 1.0})
    with pytest.raises(UserError, match="held_out_loss is not finite at step 1"):
        run(config)
    assert not (Path(config.output) / "metrics.jsonl").exists()


@pytest.fixture
def trained(config, tmp_path):
    """The folder of a checkpoint with a tokenizer."""
    run(config)
    checkpoint = Path(config.output) / "checkpoint"
    (checkpoint / "tokenizer.json").write_text("{}")
    return checkpoint


def test_a_run_begins_with_the_weights_of_init(config, trained, tmp_path):
    """The first step of the warm-up has the learning rate 0."""
    output = tmp_path / "tuned"
    tuned = dataclasses.replace(config, model={}, init=str(trained), seed=1, output=str(output))
    assert run(tuned)[0]["learning_rate"] == 0
    before, after = (
        store.load(folder, one_device()) for folder in (trained, output / "checkpoint")
    )
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert (output / "checkpoint" / "tokenizer.json").exists()


@pytest.fixture
def untouched(config):
    """Nothing may be written, whatever is wrong."""
    yield
    assert not Path(config.output).exists()


@pytest.mark.usefixtures("untouched")
def test_what_is_refused_before_anything_is_written(config, tmp_path):
    cases = {
        r"absent is no finished checkpoint": dict(model={}, init=str(tmp_path / "absent")),
        r"has none of the files .*tokenizer\.json": dict(tokenizer=str(tmp_path / "absent")),
        r"'1'": dict(model={**MODEL, 1: 2}),
        r"800 training tokens are too few": dict(data=dataclasses.replace(config.data, length=500)),
        r"held_out_every is 20, but .*tokens\.npy has 9 document": dict(
            data=dataclasses.replace(config.data, held_out_every=20)
        ),
    }
    for words, changes in cases.items():
        with pytest.raises(UserError, match=words):
            run(dataclasses.replace(config, **changes))
    np.save(config.data.tokens, np.where(np.arange(800) == 321, -100, 5))
    with pytest.raises(UserError, match=r"holds -100 at index 321.*without marks such as -100"):
        run(config)
