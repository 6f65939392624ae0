"""The cache's bookkeeping, and that a compiled step holds one copy of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.errors import UserError
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.kv_cache import (
    PAGE,
    init_cache,
    plan_writes,
    restart_rows,
    round_capacity,
)
from jaxmoe.model.kv_cache.pages import FREE
from jaxmoe.model.transformer import Llama4
from jaxmoe.plan.layout import device_bytes
from jaxmoe.plan.steps import abstract_arguments, lower_step
from pallas_kernels.attention import Coords


def test_local_layers_keep_one_chunk_and_global_layers_the_sequence(small):
    """In pages, one of them the null page, and so many that their number is a multiple of 8."""
    cache = init_cache(small.config, 9, 256)
    pages = [(layer.k.shape[0], layer.k.shape[2]) for layer in cache.layers]
    assert pages == [(1 + 9 + 6, 16), (1 + 9 * 256 // PAGE + 5, PAGE)]


def coords(positions, segments):
    return Coords(jnp.array([positions], jnp.int32), jnp.array([segments], jnp.int32))


def held(pool, row=0):
    """Positions and segments of a row's tokens, in the order of its pages."""
    position, segment = (np.asarray(x)[np.asarray(pool.table)[0, row]].ravel() for x in pool.coords)
    return position[segment != 0].tolist(), segment[segment != 0].tolist()


def free_pages(cache):
    return int((cache.full.owner == FREE).sum())


def test_padding_takes_no_slot_and_the_last_chunk_fills_the_ring(small):
    cache = init_cache(small.config, 1, PAGE)
    new = coords([0, 0, *range(14, 19)], [0, 0, 1, 1, 1, 1, 1])
    writes, cache = plan_writes(small.config, cache, new)
    full, ring = writes.values()
    full_end, ring_end = (pool.coords.segment.size for pool in cache.pools)  # nowhere
    assert full.index[0, 0].tolist() == [full_end] * 2 + [*range(PAGE, PAGE + 5)]
    # 14 and 15 are a chunk behind.
    assert ring.index[0, 0].tolist() == [ring_end] * 4 + [16, 17, 18]
    assert cache.length.tolist() == [5]
    assert held(cache.full) == ([14, 15, 16, 17, 18], [1] * 5)
    assert held(cache.pools[1]) == ([16, 17, 18], [1] * 3)


def test_a_restarted_row_holds_nothing(small):
    cache = init_cache(small.config, 2, PAGE)
    both = Coords(jnp.array([[0, 1]] * 2), jnp.ones((2, 2), jnp.int32))
    _, cache = plan_writes(small.config, cache, both)
    free = free_pages(cache)
    cache = restart_rows(cache, jnp.array([1, 0]))
    assert cache.length.tolist() == [0, 2]
    for pool in (cache.full, cache.pools[1]):
        assert held(pool) == ([], []) and held(pool, 1) == ([0, 1], [1, 1])
        assert int(pool.coords.segment.sum()) == 2
    assert free_pages(cache) == free + 1


def used(cache, shards):
    """Pages in use of each of a row's devices."""
    return (np.asarray(cache.full.owner) >= 0).reshape(shards, -1).sum(1)


@pytest.mark.slow
def test_pages_are_dealt_out_evenly(small):
    """Any prefix of one row, and short rows too."""
    shards = 8
    mesh = MeshConfig(sequence=shards).make(jax.devices()[:shards])
    with jax.set_mesh(mesh):
        cache = init_cache(small.config, 1, 4 * shards * PAGE)
        write = jax.jit(lambda cache, new: plan_writes(small.config, cache, new)[1])
        for start in range(0, 3 * shards * PAGE, 96):
            cache = write(cache, coords(range(start, start + 96), [1] * 96))
            assert np.ptp(used(cache, shards)) <= 1
        rows = init_cache(small.config, shards, shards * PAGE)
        new = Coords(jnp.zeros((shards, 1), jnp.int32), jnp.ones((shards, 1), jnp.int32))
        assert used(plan_writes(small.config, rows, new)[1], shards).tolist() == [1] * shards


def test_one_long_row_and_many_short_ones_share_a_pool(small):
    """The pool has a tenth of the pages that all rows would need with room for the longest."""
    rows, longest = 16, 64 * PAGE
    cache = init_cache(small.config, rows, longest, tokens=longest + (rows - 1) * PAGE)
    lengths = np.array([longest] + [5] * (rows - 1))
    new = jnp.arange(longest)[None] < lengths[:, None]
    positions = jnp.broadcast_to(jnp.arange(longest), new.shape)
    writes, cache = plan_writes(small.config, cache, Coords(positions, new.astype(jnp.int32)))
    assert len(cache.full.owner) < rows * longest // PAGE // 10
    assert all(held(cache.full, row)[0] == list(range(n)) for row, n in enumerate(lengths))
    full, _ = writes.values()
    where = np.asarray(full.index[0])
    assert len(set(where[new].tolist())) == lengths.sum()  # no two tokens in one place


def test_segments_far_apart_have_room_in_the_ring(small):
    """Each takes other pages of the ring, and all may be taken."""
    config = dataclasses.replace(small.config, attention_chunk_size=8192)
    cache = init_cache(config, 1, PAGE)
    for segment, start in enumerate((0, 1000, 2000, 3000), start=1):
        new = coords(range(start, start + 16), [segment] * 16)
        writes, cache = plan_writes(config, cache, new)
        _, ring = writes.values()
        assert ring.index.max() < cache.pools[1].coords.segment.size
    assert len(held(cache.pools[1])[0]) == 64


def test_without_free_pages_tokens_go_nowhere(small):
    rows = 6
    cache = init_cache(small.config, rows, 2 * PAGE, tokens=PAGE)
    new = Coords(jnp.arange(2 * PAGE)[None].repeat(rows, 0), jnp.ones((rows, 2 * PAGE), jnp.int32))
    _, full = plan_writes(small.config, cache, new)
    assert free_pages(full) == 0
    owned = np.asarray(full.full.owner)
    tokens = sum(len(held(full.full, row)[0]) for row in range(rows))
    assert tokens == PAGE * (owned >= 0).sum() == PAGE * (len(owned) - 1)
    assert not np.asarray(full.full.coords.segment)[0].any()


def test_capacity_must_be_dealt_out(small):
    mesh = MeshConfig(sequence=8).make()
    assert round_capacity(1, mesh) == 8 * PAGE
    with pytest.raises(UserError, match=f"must be {8 * PAGE}"):
        init_cache(small.config, 1, 100, mesh=mesh)


def test_unknown_formats_are_refused(small):
    with pytest.raises(UserError, match="'int2' is unknown; there are bf16, int8, fp8, int4"):
        init_cache(small.config, 1, PAGE, "int2")


def test_a_cache_made_without_the_mesh_is_refused(small):
    cache = init_cache(small.config, 1, PAGE)
    with (
        jax.set_mesh(MeshConfig(sequence=8).make()),
        pytest.raises(UserError, match=r"dealt out over 1 device\(s\) is used on a mesh with 8"),
    ):
        plan_writes(small.config, cache, coords([0], [1]))


def test_the_current_mesh_is_the_default(small):
    with jax.set_mesh(MeshConfig(sequence=8).make()):
        assert init_cache(small.config, 1, round_capacity(1)).full.table.shape == (8, 1, 1)


@pytest.mark.slow
@pytest.mark.reads_compiled
@pytest.mark.parametrize("mesh", ["sequence=8", "expert=2,sequence=2,tensor=2"])
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
