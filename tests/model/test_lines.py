"""Several tokens of a row in one line of a step: what they give one after the other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.mesh import MeshConfig
from jaxmoe.model.kernels import Kernels
from jaxmoe.model.kv_cache import init_cache, round_capacity
from jaxmoe.model.packing import Packing
from jaxmoe.model.params import abstract_params, init_params
from jaxmoe.model.transformer import forward
from tests.model.test_decode_step import LAYERS, SMALL, as_float
from tests.pallas_kernels import hopper
from tests.pallas_kernels.attention.cases import assert_close
from tests.tiers import slow

# Five query heads for a key head, as Llama 4 has: four tokens are 20 columns of the decode kernel.
CONFIG = dataclasses.replace(SMALL, num_attention_heads=5, layers=LAYERS[::2])
LONGEST, CHUNK = 90, CONFIG.attention_chunk_size  # its ring overwrites what is a chunk before
LENGTHS = np.array([LONGEST, 70, 65])
# Rows of lines of four tokens, and how many tokens each line has.
PLAIN, KERNELS = Kernels(attention="xla"), Kernels(interpret=hopper.INTERPRET)
ROWS, COUNTS = np.array([2, 0, 0, 1]), np.array([3, 4, 2, 1])


def prefilled(config, params, dtype):
    """A cache with prefixes of `LENGTHS`."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, LONGEST), np.int32)
    positions = np.broadcast_to(np.arange(LONGEST, dtype=np.int32), tokens.shape)
    segments = (positions < LENGTHS[:, None]).astype(np.int32)
    cache = init_cache(config, 3, round_capacity(128), dtype)
    run = jax.jit(lambda cache, *new: forward(config, params, *new, cache, fused=False).cache)
    return run(cache, tokens, positions, segments)


def lines(config):
    """Tokens, positions, segments and rows [4, 4], padding at the ends of lines."""
    real = np.arange(4) < COUNTS[:, None]
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, real.shape, np.int32)
    begins = LENGTHS[ROWS] + [0, 0, 4, 0]  # the second line of row 0 goes on from its first
    positions = np.where(real, begins[:, None] + np.arange(4), 0).astype(np.int32)
    rows = np.where(real, ROWS[:, None], [[2], [0], [0], [1]]).astype(np.int32)
    return tokens, positions, real.astype(np.int32), rows


@functools.partial(jax.jit, static_argnames=("config", "kernels"))
def step(config, params, cache, new, kernels=PLAIN):
    *inputs, rows = new
    return forward(config, params, *inputs, cache, packing=Packing(rows), kernels=kernels)


def one_by_one(config, params, cache, new):
    """The hidden states and the cache after a step for each token, of rows by themselves."""
    hidden = np.zeros((4, 4, config.hidden_size), np.float32)
    for line, place in np.argwhere(new[2]):
        single = [x[line : line + 1, place : place + 1] for x in new]
        out = step(config, params, cache, single)
        hidden[line, place], cache = as_float(out.hidden)[0, 0], out.cache
    return hidden, cache


def check(found, expected, real, tolerance):
    hidden, cache = expected
    assert_close(as_float(found.hidden)[real], hidden[real], tolerance)
    for mine, theirs in zip(*map(jax.tree.leaves, (found.cache[1:], cache[1:])), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for mine, theirs in zip(*map(jax.tree.leaves, (found.cache.layers, cache.layers)), strict=True):
        assert_close(as_float(mine), as_float(theirs), tolerance)


@pytest.mark.parametrize(
    "mesh", [None, *slow("sequence=2,tensor=2", "data=2,sequence=2", "expert=2")]
)
def test_a_line_is_its_tokens_one_by_one(mesh):
    """Also where drafts overwrite the chunk before in a ring, and a row has two lines."""
    config = dataclasses.replace(CONFIG, num_attention_heads=4, num_key_value_heads=2)
    params = init_params(config, jax.random.key(0))
    new = lines(config)
    expected = one_by_one(config, params, prefilled(config, params, jnp.float32), new)
    if mesh is None:
        found = step(config, params, prefilled(config, params, jnp.float32), new)
    else:
        mesh = MeshConfig.parse(mesh)
        mesh = mesh.make(jax.devices()[: np.prod(dataclasses.astuple(mesh))])
        with jax.set_mesh(mesh):
            places = jax.tree.map(lambda x: x.sharding, abstract_params(config, mesh, jnp.float32))
            params = jax.device_put(params, places)
            found = step(config, params, prefilled(config, params, jnp.float32), new)
        expected = expected[0], found.cache  # which lies otherwise
    check(found, expected, new[2] != 0, 1e-5)


@pytest.mark.slow
@pytest.mark.hopper
@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_kernels_of_a_step_take_lines(kv):
    """Catches tokens of a line that take each other's place, position, temperature or slot."""
    params = init_params(CONFIG, jax.random.key(0), jnp.bfloat16)
    cache, new = prefilled(CONFIG, params, kv), lines(CONFIG)
    expected = one_by_one(CONFIG, params, cache, new)
    with hopper.no_races():
        found = jax.block_until_ready(step(CONFIG, params, cache, new, KERNELS))
    check(found, expected, new[2] != 0, 0.03)
