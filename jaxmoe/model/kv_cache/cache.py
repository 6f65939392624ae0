"""The cache of a batch of rows: keys and values of every layer, in pools of pages by kind of cache.

Every slot carries the position and segment of its token, shared by all layers of a kind, so masks
never depend on where a token lies. Rows take pages as they grow: one row of ten million tokens and
a hundred short ones need what they hold, no more.

Shape letters: B rows, S new tokens a row.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Int

from jaxmoe import mesh as meshes
from jaxmoe.config import AttentionSpec, LayerKind, Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.mesh import current_mesh
from jaxmoe.model.kv_cache.full import FullCache
from jaxmoe.model.kv_cache.kind import CacheKind, CacheStep, Room
from jaxmoe.model.kv_cache.layer import LayerCache, empty_layer
from jaxmoe.model.kv_cache.layout import (
    PAGE,
    keys_spec,
    pool_spec,
    round_capacity,
    row_groups,
    row_spec,
    slot_shards,
)
from jaxmoe.model.kv_cache.pages import (
    Pool,
    empty_pool,
    give_back,
    pool_index,
    take_pages,
    write_coords,
)
from jaxmoe.model.kv_cache.ring import RingCache
from pallas_kernels.attention import Coords


class Cache(NamedTuple):
    """State of a batch of rows between calls of the model.

    Attributes:
        layers: keys and values, first layer to last.
        pools: of each of `cache_kinds`, the pages that its layers share.
        length: real tokens of each row so far.
    """

    layers: tuple[LayerCache, ...]
    pools: tuple[Pool, ...]
    length: Int[Array, "B"]

    @property
    def full(self) -> Pool:
        """The pool of the full cache, by which a cache's capacity is counted."""
        return self.pools[0]


def cache_kind(spec: AttentionSpec) -> CacheKind:
    """Which cache a layer keeps: a ring where its mask has a span, otherwise the full sequence."""
    return FullCache() if spec.mask.span is None else RingCache(spec.mask)


def cache_kinds(config: Llama4Config) -> tuple[CacheKind, ...]:
    """The kinds of cache of a model: first the full one, always, then those of other layers."""
    return tuple(dict.fromkeys((FullCache(), *map(cache_kind, config.attention_specs))))


def keeps_ring(config: Llama4Config, kind: LayerKind) -> bool:
    """Whether a layer keeps a ring of its newest tokens; otherwise it keeps the full sequence."""
    return isinstance(cache_kind(config.attention_spec(kind)), RingCache)


def capacity_of(cache: Cache) -> int:
    """Tokens that a row can hold."""
    shards, _, columns = cache.full.table.shape
    return shards * columns * PAGE


def pages_a_group(cache: Cache) -> int:
    """Pages of the full cache that the rows of a group share, on each of their devices."""
    shards, rows, _ = cache.full.table.shape
    return len(cache.full.owner) // (shards * row_groups(rows)) - 1


def init_cache(
    config: Llama4Config,
    rows: int,
    capacity: int,
    dtype=jnp.float32,
    mesh=None,
    *,
    tokens: int | None = None,
) -> Cache:
    """An empty cache, laid out over `mesh` if given.

    Args:
        capacity: tokens that a row can hold; a value of `round_capacity`.
        dtype: of keys and values, or one of FORMATS.
        mesh: default: the current mesh.
        tokens: that all rows together can hold, divided evenly among groups of rows on a mesh (see
            `row_groups`), each row with one run of positions; default: the capacity of each.

    Raises:
        UserError: if the capacity cannot be dealt out over the mesh, or the format is unknown.
    """
    if round_capacity(capacity, mesh) != capacity:
        raise UserError(
            f"cache capacity {capacity} must be {round_capacity(capacity, mesh)} on this mesh."
        )
    mesh = current_mesh() if mesh is None else mesh
    make = functools.partial(_empty, config, rows, capacity, dtype, tokens, mesh)
    if mesh is None:
        return make()
    shapes = abstract_cache(config, rows, capacity, dtype, mesh, tokens=tokens)
    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))()


def abstract_cache(
    config: Llama4Config, rows: int, capacity: int, dtype, mesh, *, tokens: int | None = None
) -> Cache:
    """ShapeDtypeStructs with shardings; arguments as for `init_cache`."""
    shapes = jax.eval_shape(lambda: _empty(config, rows, capacity, dtype, tokens, mesh))

    def laid_out(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(laid_out, shapes, cache_specs(config, shapes, mesh))


def cache_specs(config: Llama4Config, cache: Cache, mesh) -> Cache:
    """Where each array of a cache lies on a mesh: a Cache of PartitionSpecs."""
    rows = cache.length.shape[0]
    layers = tuple(
        jax.tree.map(functools.partial(keys_spec, mesh, rows, cache_kind(spec).sharded), layer)
        for spec, layer in zip(config.attention_specs, cache.layers, strict=True)
    )
    pools = tuple(pool_spec(mesh, rows, kind.sharded) for kind in cache_kinds(config))
    return Cache(layers, pools, row_spec(mesh, rows))  # pyrefly: ignore  # specs for arrays


def _empty(config: Llama4Config, rows: int, capacity: int, dtype, tokens, mesh) -> Cache:
    groups = row_groups(rows, mesh)
    tokens = None if tokens is None else -(-tokens // groups)
    room = Room(rows // groups, groups, slot_shards(mesh), capacity, tokens)
    sizes = {kind: kind.size(room) for kind in cache_kinds(config)}

    def layer(spec: AttentionSpec) -> LayerCache:
        size = sizes[cache_kind(spec)]
        heads, head_dim = config.num_key_value_heads, config.head_dim
        return empty_layer((size.stores * size.pages, heads, size.page, head_dim), dtype)

    pools = tuple(empty_pool(rows, *size) for size in sizes.values())
    return Cache(tuple(map(layer, config.attention_specs)), pools, jnp.zeros(rows, jnp.int32))


def restart_rows(cache: Cache, restart: Int[Array, "B"] | Bool[Array, "B"]) -> Cache:
    """Empties the rows where `restart` is true, and gives their pages back."""
    leaves = restart.astype(bool)

    def body(pools, leaves):
        return tuple(give_back(pool, leaves) for pool in pools)

    pools = _per_store(cache, body, lambda specs: specs, leaves)
    return cache._replace(pools=pools, length=jnp.where(leaves, 0, cache.length))


def plan_writes(
    config: Llama4Config, cache: Cache, new: Coords
) -> tuple[dict[CacheKind, CacheStep], Cache]:
    """Where the new tokens go, by kind of cache, and the cache with all but its keys updated.

    Tokens beyond the capacity, or beyond the pages that are free, go nowhere: callers make sure
    that there is room.

    Args:
        new: coordinates of the new tokens, [B, S]; a row's segments are contiguous.

    Raises:
        UserError: if the cache was made for another number of devices along `sequence`.
    """
    kinds, shards = cache_kinds(config), slot_shards()
    real = new.segment != 0
    order = jnp.where(real, cache.length[:, None] + jnp.cumsum(real, axis=1) - 1, -1)

    def body(pools, new, order):
        slots = [kind.slots(pool, new, order, shards) for kind, pool in _pairs(kinds, pools)]
        return tuple(_write_tokens(pool, x, new) for pool, x in zip(pools, slots, strict=True))

    def out_specs(specs):
        return tuple((spec, spec.table) for spec in specs)

    written = _per_store(cache, body, out_specs, new, order)
    steps = {
        kind: CacheStep(index, pool, old.coords)
        for (kind, old), (pool, index) in zip(_pairs(kinds, cache.pools), written, strict=True)
    }
    pools = tuple(step.pool for step in steps.values())
    return steps, cache._replace(pools=pools, length=cache.length + jnp.sum(real, axis=1))


def _pairs(kinds: tuple[CacheKind, ...], pools: tuple[Pool, ...]):
    return list(zip(kinds, pools, strict=True))


def _write_tokens(pool: Pool, slots, new: Coords) -> tuple[Pool, jax.Array]:
    """The pool with pages for the new tokens and their coordinates, and their index [1, B, S]."""
    pool = take_pages(pool, slots)
    index = pool_index(pool, slots)
    return write_coords(pool, index, new), index[None]


def _per_store(cache: Cache, body, out_specs, *of_rows):
    """Runs `body(pools, *of_rows)` on each device's pools and rows.

    Args:
        out_specs: a function that makes the PartitionSpecs of the results from those of the pools.
    """
    shards, made_for = slot_shards(), cache.full.table.shape[0]
    if shards != made_for:
        raise UserError(
            f"a cache that is dealt out over {made_for} device(s) is used on a mesh with {shards}; "
            "make it with init_cache under the mesh it is used on."
        )
    mesh = current_mesh()
    if mesh is None:
        return body(cache.pools, *of_rows)
    rows = cache.length.shape[0]
    specs = tuple(pool_spec(mesh, rows, pool.table.shape[0] > 1) for pool in cache.pools)
    in_specs = (specs, *(row_spec(mesh, rows) for _ in of_rows))
    return meshes.per_device(body, in_specs, out_specs(specs))(cache.pools, *of_rows)
