import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint import store
from jaxmoe.errors import UserError
from jaxmoe.hf_config import from_hf
from jaxmoe.mesh import MeshConfig
from jaxmoe.train import data
from jaxmoe.train.config import DataConfig, OptimizerConfig, TrainConfig
from jaxmoe.train.loss import next_token_loss
from jaxmoe.train.optimizer import make_optimizer
from jaxmoe.train.partition import everything, split
from jaxmoe.train.state import random_params, state_of
from jaxmoe.train.step import make_step
from jaxmoe.train.trainer import train
from tests import tiny
from tests.conftest import one_device
from tests.tiers import slow_after_first
from tests.train.conftest import EVERY_AXIS, EVERY_AXIS_RTOL

MODEL = tiny.scout_like(
    num_hidden_layers=2,
    no_rope_layer_interval=2,  # one local layer, one global
    hidden_size=32,
    intermediate_size=32,
    num_local_experts=8,
    num_key_value_heads=8,  # so that every axis alone can have eight devices
    vocab_size=32,
    attention_chunk_size=8,
    bos_token_id=0,
    eos_token_id=[1],
    pad_token_id=2,
)


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    """Thirty steps on documents that count: 0 5 6 7 ... 20, over and over."""

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        np.save(folder / "tokens.npy", np.tile([0, *range(5, 21)], 100))
        tokens = str(folder / "tokens.npy")
        return TrainConfig(
            model=MODEL,
            data=DataConfig(tokens=tokens, length=32, batch_size=4, held_out_every=10),
            optimizer=OptimizerConfig(peak_lr=0.01, warmup_steps=5),
            output=str(folder / "run"),
            steps=30,
            log_every=1,
            save_every=10,
        )

    return make


@pytest.fixture
def config(make_config):
    return make_config("config")


def run(config, stop_after=None):
    """The records of a run, which is dropped after some step, as if killed."""
    mesh, records = one_device(), []
    with jax.set_mesh(mesh):
        for record in train(config, mesh, "test"):
            records.append(record)
            if record["step"] == stop_after:
                break
    return records


def logged(config):
    lines = open(f"{config.output}/metrics.jsonl").read().splitlines()
    return [json.loads(line) for line in lines]


SPEED = ["tokens_per_second", "targets_per_second", "seconds_per_step"]


def without_speed(records):
    return [{k: v for k, v in r.items() if k not in SPEED} for r in records]


def test_training_learns_and_a_killed_run_resumes_to_the_same_parameters(config):
    killed = dataclasses.replace(config, output=config.output + "-killed")
    records = run(config)
    assert [r["step"] for r in records] == list(range(1, 31))
    assert records[0]["loss"] > 3 > 0.5 > records[-1]["loss"]  # ln(32) = 3.47
    assert records[-1]["held_out_loss"] < 0.5
    assert all(r["dropped"] == 0 for r in records)
    router = ["router_peak", "router_entropy", "router_load", "router_dead", "dropped"]
    numbers = ["step", "loss", "z_loss", "balance_loss", "router_z_loss", "gradient_norm"]
    numbers += ["learning_rate", "targets", *router]
    assert list(records[-1]) == [*numbers, *SPEED, "model_flops", "held_out_loss"]

    run(killed, stop_after=17)
    resumed = run(killed)
    assert [r["step"] for r in resumed] == list(range(11, 31))
    assert without_speed(logged(killed)) == without_speed(records) == without_speed(logged(config))
    params = [store.load(f"{c.output}/checkpoint", one_device())[1] for c in (config, killed)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    assert run(killed) == []  # it is finished


def test_an_output_of_another_run_is_refused(config):
    folder = Path(config.output)
    folder.mkdir()
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match="is no training run"):
        run(config)
    (folder / "config.json").write_text(json.dumps({"steps": 31}))
    with pytest.raises(UserError, match="a run of another config"):
        run(config)


def test_tokens_beyond_the_vocabulary_are_refused(config):
    np.save(config.data.tokens, np.arange(200))
    with pytest.raises(UserError, match=r"tokens\.npy holds 32 at index 32.*are 0 to 31"):
        run(config)


def test_a_bad_model_is_refused_by_key(config):
    bad = dataclasses.replace(config, model={**MODEL, "hiden_size": 3})
    with pytest.raises(UserError, match=r"test, model.*hiden_size"):
        run(bad)


def nothing_frozen(state):
    return split(state.params, everything)[1]


STEPS, ROWS, LENGTH = 20, 8, 32
ROUTERS = {"router_loss": 0.05, "router_z_loss": 0.01, "z_loss": 0.001}


def packed_batch(tokens, step):
    """Rows of whole documents and padding, with fewer tokens and targets in each than before it.

    So a mean of the means of rows, or of devices, is not the mean of all targets.
    """
    batch = data.training_batch(tokens, 0, length=LENGTH, rows=ROWS, seed=0, step=step)
    column, row = np.arange(LENGTH), np.arange(ROWS)[:, None]
    segment_ids = batch.segment_ids * (column < LENGTH - 2 * row)
    return batch._replace(segment_ids=segment_ids, learned=(column + row) % (row + 2) > 0)


def first_losses(config, mesh, steps=STEPS):
    """All that a step says of its losses, and the norm of their gradient; the state after it.

    Args:
        steps: how many.
    """
    model = from_hf(config.model, "test")
    optimizer = make_optimizer(config.optimizer, config.steps)
    tokens = data.read_tokens(config.data.tokens)
    with jax.set_mesh(mesh):
        state = state_of(random_params(model, mesh, config.seed), optimizer, mesh)
        step = make_step(config, model, optimizer, next_token_loss(**ROUTERS))
        results = []
        for i in range(steps):
            state, outcome = step(nothing_frozen(state), state, packed_batch(tokens, i))
            names = "loss", "balance_loss", "router_z_loss", "z_loss"
            results.append([*(float(outcome.metrics[x]) for x in names), float(outcome.norm)])
    return results, state


@pytest.fixture(scope="module")
def alone(make_config):
    """The first losses on one device."""
    return first_losses(make_config("alone"), one_device())[0]


@pytest.mark.parametrize("mesh", slow_after_first(EVERY_AXIS[::-1]))
def test_training_is_the_same_on_any_mesh(config, alone, mesh):
    assert alone[-1][0] < 0.1 * alone[0][0]
    spread, state = first_losses(config, MeshConfig.parse(mesh).make())
    np.testing.assert_allclose(spread, alone, rtol=EVERY_AXIS_RTOL)
    query = state.params["layers"][0]["attention"]["q"]
    alike = [m for m in jax.tree.leaves(state.optimizer) if m.shape == query.shape]
    assert alike and all(m.sharding == query.sharding for m in alike)


def test_bfloat16_computes_roughly_the_same_and_trains_float32(config, alone):
    bfloat16 = dataclasses.replace(config, dtype="bfloat16")
    rounded, state = first_losses(bfloat16, one_device(), steps=3)
    assert rounded != alone[:3]
    weights = 1, ROUTERS["router_loss"]
    totals = (np.array(results)[:, :2] @ weights for results in (rounded, alone[:3]))
    np.testing.assert_allclose(*totals, rtol=0.02)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert kinds == {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.slow
@pytest.mark.reads_compiled
def test_the_step_reuses_the_memory_of_the_state(config):
    model = from_hf(config.model, "test")
    model = dataclasses.replace(model, layers=model.layers[-1:])
    optimizer = make_optimizer(config.optimizer, config.steps)
    rows = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    mesh = one_device()
    with jax.set_mesh(mesh):
        state = state_of(random_params(model, mesh, seed=0), optimizer, mesh)
        step = make_step(config, model, optimizer, next_token_loss())
        compiled = step.lower(nothing_frozen(state), state, data.Batch(rows, rows)).compile()
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == nbytes
