"""Devices that hold whole chunks send nothing in local layers: what others hold is poison."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import layer_kinds
from jaxmoe.eval.logits import token_logits
from jaxmoe.mesh import MeshConfig
from jaxmoe.model import sequence
from jaxmoe.model.params import abstract_params, init_params
from jaxmoe.model.transformer import forward
from tests.model.test_paged_cache import CONFIG as PAGED

CHUNK = 64
CONFIG = dataclasses.replace(PAGED, attention_chunk_size=CHUNK, layers=layer_kinds(2))
LENGTH = 8 * CHUNK
MESHES = ["sequence=8", "data=2,sequence=4", "sequence=2,fsdp=2,tensor=2"]

assert all(kind.attention == "local" for kind in CONFIG.layers)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture
def poison(monkeypatch):
    """Keys and values from other devices are NaN."""

    class Poisoned:
        def __getattr__(self, name):
            return getattr(jax.lax, name)

        def all_gather(self, x, *arguments, **more):
            return jax.lax.all_gather(x, *arguments, **more) * jnp.nan

    monkeypatch.setattr(sequence, "lax", Poisoned())
    jax.clear_caches()
    yield
    jax.clear_caches()


def rows(padding=0):
    """One text, and two that meet where two devices do, after some padding; and their segments."""
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, LENGTH), np.int32)
    segments = np.ones_like(tokens)
    segments[1, LENGTH // 2 :] = 2
    segments[0, :padding] = 0
    return tokens, segments


def placed(params, mesh):
    places = abstract_params(CONFIG, mesh, jnp.float32)
    return jax.device_put(params, jax.tree.map(lambda x: x.sharding, places))


def on(mesh, params, batch, **path):
    mesh = MeshConfig.parse(mesh).make()
    with jax.set_mesh(mesh):
        return token_logits(CONFIG, placed(params, mesh), *batch, **path)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_whole_pass(params, poison, mesh):
    expected = token_logits(CONFIG, params, *rows())
    assert abs(on(mesh, params, rows()) - expected).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[:1])
def test_prefill_in_whole_chunks(params, poison, mesh):
    path = {"prefill_chunk": LENGTH, "decode_from": LENGTH}
    more = tuple(np.concatenate([x, x[:, -3:]], axis=1) for x in rows())
    expected = token_logits(CONFIG, params, *more)
    assert abs(on(mesh, params, more, **path) - expected).max() < 1e-5


@pytest.mark.parametrize("path", [{}, {"prefill_chunk": LENGTH}])
def test_chunks_that_meet_are_gathered(params, poison, path):
    """Else the tests above would prove nothing: padding moves one row's chunks."""
    logits = on("sequence=8", params, rows(padding=5), **path)
    assert np.isnan(logits).any()


def test_a_begun_chunk_is_kept(params, poison):
    """Whole chunks on each device, but the row ends within one, which the cache must hold."""
    tokens, segments = rows()
    segments[1, -9:] = 0
    path = {"prefill_chunk": LENGTH}
    assert np.isnan(on("sequence=8", params, (tokens, segments), **path)).any()


@pytest.mark.parametrize("padding", [0, 5])
def test_a_cache_with_and_without_begun_chunks(params, padding):
    tokens, segments = rows(padding)
    segments[1, -9:] = 0
    tokens, segments = (np.concatenate([x, x[:, :70]], axis=1) for x in (tokens, segments))
    segments[:, LENGTH:] = [[1], [2]]
    expected = token_logits(CONFIG, params, tokens, segments)
    path = {"prefill_chunk": LENGTH, "decode_from": LENGTH}
    found = on("data=2,sequence=4", params, (tokens, segments), **path)
    assert abs(found - expected).max() < 1e-5


def gradient(params, batch):
    tokens, segments = map(jnp.asarray, batch)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)

    @jax.jit
    def grad(params):
        def loss(params):
            return jnp.square(forward(CONFIG, params, tokens, positions, segments).hidden).mean()

        return jax.grad(loss)(params)

    return jax.tree.map(np.asarray, grad(params))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[2:])
def test_gradients(params, poison, mesh):
    expected = gradient(params, rows())
    mesh = MeshConfig.parse(mesh).make()
    with jax.set_mesh(mesh):
        found = gradient(placed(params, mesh), rows())
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * max(1e-2, abs(one).max()), rtol=1e-4)
