import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.train.config import OptimizerConfig
from jaxmoe.train.optimizer import learning_rate, make_optimizer

CONFIG = OptimizerConfig(peak_lr=0.5, warmup_steps=10, final_lr=0.2, weight_decay=0.1)


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.0), (5, 0.25), (10, 0.5), (60, 0.3), (110, 0.1), (500, 0.1)]
)
def test_warm_up_is_linear_and_decay_a_cosine(step, rate):
    np.testing.assert_allclose(learning_rate(CONFIG, steps=110)(step), rate, rtol=1e-6)


def update(small, config, gradient_value):
    """One step's updates and optimizer state, every gradient entry being the same."""
    optimizer = make_optimizer(config, steps=100)

    @jax.jit
    def step(params):
        gradient = jax.tree.map(lambda p: jnp.full_like(p, gradient_value), params)
        return optimizer.update(gradient, optimizer.init(params), params)

    return step(small.params)


def test_matrices_decay_and_norms_do_not(small):
    config = OptimizerConfig(peak_lr=0.5, warmup_steps=0, weight_decay=0.1)
    updates, _ = update(small, config, 0.0)
    np.testing.assert_allclose(updates["embed"], -0.5 * 0.1 * small.params["embed"], rtol=1e-6)
    experts = small.params["layers"][0]["feed_forward"]["experts"]["down"]
    moved = updates["layers"][0]["feed_forward"]["experts"]["down"]
    np.testing.assert_allclose(moved, -0.5 * 0.1 * experts, rtol=1e-6)
    norms = [updates["norm"], *(layer["attention_norm"] for layer in updates["layers"])]
    norms += [layer["feed_forward_norm"] for layer in updates["layers"]]
    assert not any(norm.any() for norm in norms)


def test_gradients_are_clipped_by_their_global_norm(small):
    """After clipping to norm 1 the first moment is (1 - beta1) * gradient / norm."""
    _, state = update(small, CONFIG, 3.0)
    count = sum(p.size for p in jax.tree.leaves(small.params))
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == small.params["embed"].shape]
    np.testing.assert_allclose(moments[0], 0.1 * count**-0.5, rtol=1e-4)


def test_a_clip_norm_of_0_clips_nothing(small):
    _, state = update(small, dataclasses.replace(CONFIG, clip_norm=0.0), 3.0)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == small.params["embed"].shape]
    np.testing.assert_allclose(moments[0], 0.1 * 3.0, rtol=1e-6)
