"""What the backward pass computes again: the same gradients, from fewer kept numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import Llama4Config
from jaxmoe.hf_config import from_hf
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.params import init_params
from jaxmoe.model.transformer import forward
from tests import tiny

CONFIG: Llama4Config = from_hf(
    tiny.scout_like(num_hidden_layers=2, hidden_size=16, intermediate_size=32), "test"
)
TOKENS = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
POSITIONS = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 8))


def total(params, remat):
    out = forward(CONFIG, params, TOKENS, POSITIONS, jnp.ones_like(TOKENS), remat=remat)
    return jnp.sum(jnp.sin(out.hidden))


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def gradient(params):
    return jax.grad(total)(params, "none")


def kept(params, remat):
    """How many numbers wait for the backward pass, the parameters among them."""
    backward = jax.eval_shape(lambda p: jax.vjp(lambda p: total(p, remat), p)[1], params)
    return sum(x.size for x in jax.tree.leaves(backward))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "attention", "dots", True])
def test_gradients_are_the_same(params, gradient, remat):
    found = jax.grad(total)(params, remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, gradient)


def test_what_is_kept(params):
    full, attention, dots, none = (kept(params, x) for x in ("full", "attention", "dots", "none"))
    assert full < attention < none and full < dots < none
    heads, size = CONFIG.num_attention_heads, CONFIG.head_dim
    wanted = 2 * TOKENS.size * heads * (size + 1)  # output and log-sum-exp, in two layers
    assert attention - full == pytest.approx(wanted, abs=4)  # and scalars


def test_devices_that_share_matrices_share_what_is_kept(params, gradient):
    """Catches a layer's input that every device of `tensor` keeps whole; gradients are the same."""
    with jax.set_mesh(MeshConfig.parse("sequence=2,tensor=2").make(jax.devices()[:4])):
        backward = jax.jit(lambda p: jax.vjp(lambda p: total(p, "full"), p)[1])(params)
        found = jax.tree.map(np.asarray, jax.jit(backward)(jnp.float32(1))[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, gradient)
    inputs = [x for x in jax.tree.leaves(backward) if x.shape == (*TOKENS.shape, 16)]
    shares = [x.sharding.shard_shape(x.shape) for x in inputs]
    assert len(shares) >= 2
    assert {tokens for _, tokens, _ in shares} == {TOKENS.shape[1] // 4}
