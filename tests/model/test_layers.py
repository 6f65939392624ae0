"""Rotary frequencies of the published models, and the routing rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import MAVERICK, SCOUT
from jaxmoe.model.layers import rms_norm, rope_angles, rope_frequencies
from jaxmoe.model.moe import moe, route
from jaxmoe.model.params import init_params
from pallas_kernels.attention import ChunkedMask

CHUNKED = ChunkedMask(chunk=8192)


def frequencies(config):
    return np.asarray(rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))


@pytest.mark.parametrize("config", [SCOUT, MAVERICK], ids=["scout", "maverick"])
@pytest.mark.parametrize("index, value", [(0, 1.0), (1, 0.8146172), (34, 9.384739e-4)])
def test_unscaled_frequencies(config, index, value):
    np.testing.assert_allclose(frequencies(config)[index], value, rtol=1e-6)


@pytest.mark.parametrize(
    "config, index, value",
    [(SCOUT, 35, 4.778106e-5), (SCOUT, 63, 1.534463e-7), (MAVERICK, 35, 7.644970e-4)],
)
def test_scaled_frequencies(config, index, value):
    np.testing.assert_allclose(frequencies(config)[index], value, rtol=1e-6)


def test_scaling_is_a_threshold_where_low_equals_high():
    ratio = frequencies(MAVERICK) / frequencies(SCOUT)
    np.testing.assert_allclose(ratio[:35], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[35:], 16, rtol=1e-6)


def test_angles_come_from_the_place_in_the_chunk():
    far = jnp.array([[10_485_759, 8192, 8191]])
    cos, sin = rope_angles(SCOUT, CHUNKED, far)
    near_cos, near_sin = rope_angles(SCOUT, CHUNKED, far % 8192)
    np.testing.assert_array_equal(cos, near_cos)
    np.testing.assert_array_equal(sin, near_sin)


def test_norm_rounds_before_the_weight():
    x = jnp.array([[1.0, 2.0, 3.0]], jnp.bfloat16)
    weight = jnp.array([1.01, 0.99, 1.02], jnp.bfloat16)
    x32 = np.asarray(x, np.float32)
    normalized = x32 / np.sqrt((x32**2).mean() + 1e-5)
    expected = jnp.asarray(normalized).astype(jnp.bfloat16) * weight
    np.testing.assert_array_equal(rms_norm(x, weight, 1e-5), expected)


@pytest.mark.parametrize("top_k", [1, 2])
def test_score_scales_the_input_of_each_chosen_expert(small, top_k):
    config = dataclasses.replace(small.config, num_experts_per_tok=top_k)
    p = init_params(config, jax.random.key(0))["layers"][0]["feed_forward"]
    x = jax.random.normal(jax.random.key(1), (2, 9, config.hidden_size))
    real = jnp.ones((2, 9), bool).at[0, :4].set(False)
    out, stats = moe(config, p, x, real)

    def expert(e, z):
        w = {name: np.asarray(p["experts"][name][e], np.float64) for name in p["experts"]}
        gate = z @ w["gate"]
        return (gate / (1 + np.exp(-gate)) * (z @ w["up"])) @ w["down"]

    shared = {name: np.asarray(w, np.float64) for name, w in p["shared"].items()}
    for row, col in np.ndindex(2, 9):
        z = np.asarray(x[row, col], np.float64)
        logits = z @ np.asarray(p["router"], np.float64)
        gate = z @ shared["gate"]
        expected = (gate / (1 + np.exp(-gate)) * (z @ shared["up"])) @ shared["down"]
        if real[row, col]:
            for e in np.argsort(-logits)[:top_k]:
                expected = expected + expert(e, z / (1 + np.exp(-logits[e])))
        np.testing.assert_allclose(out[row, col], expected, atol=2e-5)
    routing = route(config, p["router"], x, real)
    assert (np.asarray(routing.expert)[0, :4] == config.num_local_experts).all()
    assert (stats.tokens, stats.dropped) == (14, 0)
    chosen = np.asarray(routing.expert)[np.asarray(real)].reshape(-1)
    np.testing.assert_array_equal(stats.assignments, np.bincount(chosen, minlength=8))
