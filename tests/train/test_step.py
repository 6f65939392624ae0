"""The compiled step: several batches as one, bfloat16 parameters, and steps that are left out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmoe.hf_config import from_hf
from jaxmoe.mesh import MeshConfig
from jaxmoe.train import data
from jaxmoe.train.config import OptimizerConfig, TrainConfig
from jaxmoe.train.loss import next_token_loss
from jaxmoe.train.optimizer import make_optimizer
from jaxmoe.train.partition import everything, split
from jaxmoe.train.state import abstract_state, random_params, state_of
from jaxmoe.train.step import MOST_SKIPPED, make_step, rounded_at_random
from tests import tiny
from tests.conftest import one_device

MODEL = from_hf(
    tiny.scout_like(num_hidden_layers=1, hidden_size=16, intermediate_size=16, bos_token_id=0), "x"
)
BAD = 99  # a token at which the loss is made NaN


def make_config(**changes):
    optimizer = OptimizerConfig(peak_lr=0.01, warmup_steps=1)
    return TrainConfig(
        model={"a": 1}, data=None, optimizer=optimizer, output="", steps=9, **changes
    )


def counted_loss(model, params, batch):
    """The mean over targets, which says how many there are; NaN where `BAD` is."""
    value, metrics = next_token_loss()(model, params, batch)
    ids = batch.segment_ids
    targets = jnp.sum((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0)).astype(jnp.float32)
    bad = jnp.any(batch.tokens == BAD)
    of_first = {"loss/first": batch.tokens[0, 0] / 1.0, "targets/first": targets + 2.0}
    return value * jnp.where(bad, jnp.nan, 1.0), metrics | {"targets": targets} | of_first


def rows(seed, real):
    """A row of 8 tokens for each number of real ones; the rest is padding."""
    tokens = np.random.default_rng(seed).integers(3, 90, (len(real), 8)).astype(np.int32)
    return data.Batch(tokens, (np.arange(8) < np.array(real)[:, None]).astype(np.int32))


def take(config, batches, optimizer=None, mesh=None, storage=None):
    """The state after a step for each batch, and the last outcome."""
    outcome = None
    mesh = one_device() if mesh is None else mesh
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, 9) if optimizer is None else optimizer
        params = random_params(MODEL, mesh, seed=0)
        abstract = abstract_state(params, optimizer, mesh, **(storage or {}))
        state = state_of(params, optimizer, mesh, **(storage or {}))
        frozen = split(params, everything)[1]
        step = make_step(config, MODEL, optimizer, counted_loss, abstract)
        for batch in batches:
            state, outcome = step(frozen, state, batch)
    return state, outcome


def test_batches_with_unequal_targets_count_as_one():
    """With a learning rate of 1 the parameters change by the gradient."""
    whole = rows(1, [8, 8, 3, 2, 1, 1])
    parts = jax.tree.map(lambda x: x.reshape(3, 2, 8), whole)
    one, seen = take(make_config(), [whole], optax.sgd(1.0))
    many, summed = take(make_config(accumulate=3), [parts], optax.sgd(1.0))
    for ours, theirs in zip(*map(jax.tree.leaves, (many.params, one.params)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)
    assert float(seen.targets) == float(summed.targets) == summed.metrics["targets"] == 17
    np.testing.assert_allclose(summed.metrics["loss"], seen.metrics["loss"], rtol=1e-6)
    assert summed.metrics["dropped"] == 0
    counts, firsts = np.array([14, 3, 0]) + 2, whole.tokens[::2, 0]  # of the three batches
    assert summed.metrics["targets/first"] == counts.sum()
    mean = (counts * firsts).sum() / counts.sum()
    np.testing.assert_allclose(summed.metrics["loss/first"], mean, rtol=1e-6)
    np.testing.assert_allclose(summed.norm, seen.norm, rtol=1e-5)


def test_a_batch_without_targets_changes_nothing_beside_others():
    whole = rows(1, [8, 8])
    parts = jax.tree.map(lambda *x: np.stack(x), whole, rows(2, [1, 1]))
    one, _ = take(make_config(), [whole], optax.sgd(1.0))
    many, _ = take(make_config(accumulate=2), [parts], optax.sgd(1.0))
    np.testing.assert_allclose(many.params["embed"], one.params["embed"], atol=1e-6)


def test_steps_that_are_not_finite_are_skipped_and_counted():
    good, bad = rows(1, [8, 8]), rows(1, [8, 8])
    bad.tokens[0, 0] = BAD
    plain, _ = take(make_config(), [good, good])
    state, outcome = take(make_config(not_finite="skip"), [good, bad, bad, good])
    assert [int(x) for x in state[2:]] == [4, 2, 0] and not outcome.halted
    jax.tree.map(np.testing.assert_array_equal, state.params, plain.params)
    jax.tree.map(np.testing.assert_array_equal, state.optimizer, plain.optimizer)
    state, outcome = take(make_config(not_finite="skip"), [good] + [bad] * MOST_SKIPPED + [good])
    assert outcome.halted and [int(x) for x in state[2:]] == [10, 9, 10]
    state, outcome = take(make_config(), [good, bad, good])  # begun before the host knew
    assert outcome.halted and [int(x) for x in state[2:]] == [1, 0, 1]


def test_rounding_at_random_is_right_on_average():
    """Ordinary rounding makes all of them 1; the next number is 1 + 2**-7."""
    x = jnp.full((20000,), 1 + 2.0**-10)
    rounded = np.asarray(rounded_at_random(x, jax.random.key(0)), np.float64)
    assert set(rounded) == {1.0, 1 + 2.0**-7}
    assert abs(rounded.mean() - float(x[0])) < 4 * 2.0**-7 * (7 / 64 / 20000) ** 0.5
    exact = jnp.array([0.0, -0.0, 1.5, -3.0, 2.0**100], jnp.float32)
    np.testing.assert_array_equal(rounded_at_random(exact, jax.random.key(1)), exact)


def test_parameters_in_bfloat16_move_by_updates_below_their_spacing():
    config = make_config(params_dtype="bfloat16")
    small = dataclasses.replace(config.optimizer, peak_lr=1e-4, warmup_steps=0)
    config = dataclasses.replace(config, optimizer=small)
    batches = [rows(i, [8, 8]) for i in range(5)]
    start, _ = take(config, [], storage={"dtype": "bfloat16"})
    state, _ = take(config, batches, storage={"dtype": "bfloat16"})
    wide, _ = take(dataclasses.replace(config, params_dtype="float32"), batches)
    origin = random_params(MODEL, one_device(), seed=0)
    moved = flat(state.params) - flat(start.params)
    wanted = flat(wide.params) - flat(origin)
    assert abs(moved @ wanted / (wanted @ wanted) - 1) < 0.1
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert {str(x.dtype) for x in jax.tree.leaves(state.optimizer)} == {"float32", "int32"}


def flat(params):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(params)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_moments_in_the_hosts_memory_take_the_same_steps(name):
    config = make_config()
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name=name))
    mesh = MeshConfig.parse("fsdp=2,expert=2,tensor=2").make()
    batches = [rows(i, [8, 8, 8, 5]) for i in range(3)]
    here, _ = take(config, batches, mesh=mesh)
    there, _ = take(config, batches, mesh=mesh, storage={"offload": True})
    jax.tree.map(np.testing.assert_array_equal, here, there)
    alone, _ = take(config, batches)
    for ours, theirs in zip(*map(jax.tree.leaves, (here.params, alone.params)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(there.optimizer) if x.size > 3}
    assert kinds == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(there.params)} == {"device"}
