"""Parameters that a run's `frozen` names are not trained."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.hf_config import from_hf
from jaxmoe.train.config import DataConfig, OptimizerConfig, TrainConfig
from jaxmoe.train.partition import all_but, dotted, everything, split, text_only
from jaxmoe.train.state import random_params
from jaxmoe.train.trainer import train
from tests.conftest import one_device
from tests.train.test_trainer import MODEL

PARAMS = {
    "embed": 0,
    "layers": [{"router": 1, "q": 2}, {"router": 3, "q": 4}],
    "vision": {"q": 5},
}


def test_patterns_are_taken_from_what_is_trained():
    trainable = all_but(["layers.*.router", "embed"], text_only, PARAMS)
    trained, frozen = split(PARAMS, trainable)
    assert jax.tree.leaves(trained) == [2, 4]
    assert jax.tree.leaves(frozen) == [0, 1, 3, 5]
    assert all_but([], everything, PARAMS)("vision.q")


def test_a_pattern_without_a_parameter_is_refused():
    with pytest.raises(UserError, match=r"'layers\.\*\.gate', which is no parameter's name"):
        all_but(["embed", "layers.*.gate"], everything, PARAMS)
    with pytest.raises(UserError, match="leaves no parameter to train"):
        all_but(["embed", "layers.*"], text_only, PARAMS)


@pytest.fixture
def config(tmp_path):
    np.save(tmp_path / "tokens.npy", np.tile([0, *range(5, 21)], 20))
    return TrainConfig(
        model=MODEL,
        data=DataConfig(tokens=str(tmp_path / "tokens.npy"), length=32, batch_size=2),
        optimizer=OptimizerConfig(peak_lr=0.01, warmup_steps=0),
        output=str(tmp_path / "run"),
        steps=1,
        frozen=("layers.*.feed_forward.router",),
        z_loss=1e-4,
        router_z_loss=1e-3,
    )


def test_a_run_leaves_frozen_routers_as_they_are(config):
    """The result has them too; everything else moves."""
    found, mesh = [], one_device()
    with jax.set_mesh(mesh):
        before = random_params(from_hf(MODEL, "test"), mesh, config.seed)
        (record,) = train(config, mesh, result=lambda params: found.append(params) or params)
    assert record["router_z_loss"] > 0 and record["z_loss"] > 0
    after = dict(jax.tree.leaves_with_path(found[0]))
    for path, start in jax.tree.leaves_with_path(before):
        moved = not np.array_equal(start, after[path])
        assert moved != dotted(path).endswith("router"), dotted(path)


def test_a_mistake_in_frozen_is_found_before_anything_is_written(config):
    wrong = dataclasses.replace(config, frozen=("layers.*.feed_forward.gate",))
    with pytest.raises(UserError, match=r"layers\.\*\.feed_forward\.gate"):
        list(train(wrong, one_device()))
    assert not Path(config.output).exists()
