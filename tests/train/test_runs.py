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
from jaxmoe.mesh import MeshConfig
from jaxmoe.train import data, trainer
from jaxmoe.train.config import DataConfig, OptimizerConfig, TrainConfig
from jaxmoe.train.loss import next_token_loss
from jaxmoe.train.optimizer import learning_rate
from tests import tiny
from tests.conftest import one_device

MODEL = tiny.scout_like(num_hidden_layers=1, hidden_size=16, intermediate_size=16, bos_token_id=0)
BAD_ROWS = np.full((2, 8), 99)
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
    factor = jnp.where(jnp.any(batch.tokens == BAD), jnp.nan, 1.0)
    return total * factor, metrics | {"loss": metrics["loss"] * factor}


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


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ten_steps_in_a_row_end_a_run_that_skips(config, accumulate):
    config = dataclasses.replace(config, steps=20, not_finite="skip", accumulate=accumulate)
    with pytest.raises(UserError, match=r"is not finite at step 10; .* after step 9"):
        run(config, loss=lambda *given: bad_loss(*given[:2], given[2]._replace(tokens=BAD_ROWS)))
    records = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").open()]
    assert [(r["step"], r["skipped"], r["loss"]) for r in records] == [
        (step, step, None) for step in range(1, 10)
    ]


def test_a_step_that_is_skipped_is_followed_by_others(config):
    """Its batch is not seen again, and the learning rate takes no step."""
    config = dataclasses.replace(with_bad_token(config, step=3), not_finite="skip")
    records = run(config, loss=bad_loss)
    skipped = [r["skipped"] for r in records]
    assert skipped[:3] == [0, 0, 0] and skipped[3] == 1 and records[3]["loss"] is None
    bad = [i for i, r in enumerate(records) if r["loss"] is None]
    assert skipped[-1] == len(bad) and [r["step"] for r in records] == list(range(1, 9))
    assert records[4]["learning_rate"] == float(learning_rate(config.optimizer, 8)(3))


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(config):
    """What a config may change meanwhile: the mesh, and how layers are computed again."""
    config = dataclasses.replace(config, steps=8, save_every=2, accumulate=2, mesh="data=4")
    meshes = [
        MeshConfig.parse(mesh).make(jax.devices()[:4]) for mesh in ("data=4", "tensor=2,fsdp=2")
    ]
    other = dataclasses.replace(config, mesh="tensor=2,fsdp=2", remat="attention")
    undisturbed = dataclasses.replace(config, output=config.output + "-undisturbed")
    with jax.set_mesh(meshes[0]):
        wanted = list(trainer.train(undisturbed, meshes[0]))
        killed = trainer.train(config, meshes[0])
        assert [next(killed)["step"] for _ in range(5)] == [1, 2, 3, 4, 5]
        killed.close()
    with jax.set_mesh(meshes[1]):
        resumed = list(trainer.train(other, meshes[1]))
    assert [r["step"] for r in resumed] == [5, 6, 7, 8]
    found = [[r["loss"] for r in records] for records in (resumed, wanted[4:])]
    np.testing.assert_allclose(*found, rtol=1e-5)
    with pytest.raises(UserError, match="another config"):
        run(dataclasses.replace(config, seed=3))


def test_the_best_checkpoint_is_kept_beside_the_last(config):
    """By the held-out loss, over a kill too, with the parameters of its step."""
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 0.5}
    config = dataclasses.replace(
        config, steps=8, save_every=2, keep="best", evaluate_every=2, data=None
    )
    seen = {}

    def evaluate(params):
        step = 2 * (len(seen) + 1)
        seen[step] = np.asarray(params["embed"])
        return {"held_out_loss": losses[step]}

    rows = np.random.default_rng(0).integers(3, 90, (8, 2, 8)).astype(np.int32)
    functions = {"batches": lambda n: data.Batch(rows[n], np.ones((2, 8), np.int32))}

    def best():
        return np.asarray(store.load(f"{config.output}/best", one_device())[1]["embed"])

    mesh = one_device()
    with jax.set_mesh(mesh):
        killed = trainer.train(config, mesh, evaluate=evaluate, **functions)
        for record in killed:
            if record["step"] == 7:
                break
        killed.close()
        np.testing.assert_array_equal(best(), seen[4])
        losses[8] = 1.5
        list(trainer.train(config, mesh, evaluate=evaluate, **functions))
        np.testing.assert_array_equal(best(), seen[4])


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
