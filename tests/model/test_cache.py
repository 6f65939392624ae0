"""The cache's bookkeeping, and that a compiled step holds one copy of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.errors import UserError
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.cache import (
    DEAL,
    deal_out,
    init_cache,
    plan_writes,
    restart_rows,
    round_capacity,
)
from jaxmoe.model.transformer import Llama4
from jaxmoe.plan.layout import device_bytes
from jaxmoe.plan.steps import abstract_arguments, lower_step
from pallas_kernels.attention import Coords


def test_local_layers_keep_one_chunk_and_global_layers_the_sequence(small):
    cache = init_cache(small.config, 2, 256)
    slots = [layer.k.shape[2] for layer in cache.layers]
    assert slots == [16, 16, 16, 256]


def coords(positions, segments):
    return Coords(jnp.array([positions], jnp.int32), jnp.array([segments], jnp.int32))


def test_padding_takes_no_slot_and_the_last_chunk_fills_the_ring(small):
    cache = init_cache(small.config, 1, 64)
    new = coords([0, 0, *range(14, 19)], [0, 0, 1, 1, 1, 1, 1])
    writes, cache = plan_writes(cache, new)
    assert writes.log[0].tolist() == [64, 64, 0, 1, 2, 3, 4]
    assert writes.ring[0].tolist() == [16, 16, 16, 16, 0, 1, 2]  # 14 and 15 are a chunk behind
    assert cache.length.tolist() == [5]
    assert cache.log.position[0, :5].tolist() == [14, 15, 16, 17, 18]
    assert cache.ring.segment[0].tolist() == [1, 1, 1] + [0] * 13


def test_a_restarted_row_holds_nothing(small):
    cache = init_cache(small.config, 2, 64)
    both = Coords(jnp.array([[0, 1]] * 2), jnp.ones((2, 2), jnp.int32))
    _, cache = plan_writes(cache, both)
    cache = restart_rows(cache, jnp.array([1, 0]))
    assert cache.length.tolist() == [0, 2]
    assert not cache.log.segment[0].any() and cache.log.segment[1, :2].all()
    assert not cache.ring.segment[0].any() and cache.ring.segment[1, :2].all()


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_slots_are_dealt_out_evenly(shards):
    capacity = 4 * shards * DEAL
    places = np.asarray(deal_out(jnp.arange(capacity), capacity, shards))
    assert sorted(places.tolist()) == list(range(capacity))
    for prefix in range(0, capacity + 1, DEAL):
        held = np.bincount(places[:prefix] // (capacity // shards), minlength=shards)
        assert held.max() - held.min() <= DEAL


def test_capacity_must_be_dealt_out(small):
    mesh = MeshConfig(sequence=8).make()
    assert round_capacity(1, mesh) == 8 * DEAL
    with pytest.raises(UserError, match="must be 512"):
        init_cache(small.config, 1, 100, mesh=mesh)


def test_a_cache_made_without_the_mesh_is_refused(small):
    cache = init_cache(small.config, 1, 64)
    with (
        jax.set_mesh(MeshConfig(sequence=8).make()),
        pytest.raises(UserError, match="64 slots cannot be dealt out over 8 devices"),
    ):
        plan_writes(cache, coords([0], [1]))


def test_the_current_mesh_is_the_default(small):
    with jax.set_mesh(MeshConfig(sequence=8).make()):
        assert init_cache(small.config, 1, round_capacity(1)).log.position.shape == (1, 8 * DEAL)


@pytest.mark.parametrize("mesh", ["data=8", "sequence=8", "expert=2,sequence=2,tensor=2"])
def test_decode_updates_the_cache_in_place(small, mesh):
    mesh = MeshConfig.parse(mesh).make()
    capacity = round_capacity(2**14 + 1, mesh)  # no power of two
    arguments = abstract_arguments(small.config, mesh, rows=8, tokens=1, capacity=capacity)
    memory = lower_step(small.config, mesh, arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes == device_bytes(arguments[-1])
    one_layer = device_bytes(arguments[-1].layers[-1])
    assert memory.temp_size_in_bytes < one_layer


def test_the_module_owns_the_same_parameters(small):
    model = Llama4.init(small.config, nnx.Rngs(0))
    assert jax.tree.structure(model.params()) == jax.tree.structure(small.params)
    tokens, segments = jnp.ones((1, 5), jnp.int32), jnp.ones((1, 5), jnp.int32)
    assert model(tokens, segments).shape == (1, 5, small.config.vocab_size)
    graph, state = nnx.split(model)
    assert nnx.merge(graph, state).config == small.config
