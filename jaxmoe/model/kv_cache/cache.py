"""The cache of a batch of rows: keys and values of every layer, in pools of pages by kind of cache.

Every slot carries the position and segment of its token, shared by all layers of a kind, so masks
never depend on where a token lies. Rows take pages as they grow: one row of ten million tokens and
a hundred short ones need what they hold, no more.

Shape letters: B rows, S new tokens a row.
"""

import functools
from typing import Any, NamedTuple

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
from jaxmoe.model.kv_cache.layer import LayerCache, PieceTable, empty_layer
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
    give_back_empty,
    pool_index,
    take_pages,
    write_coords,
)
from jaxmoe.model.kv_cache.ring import RingCache
from jaxmoe.model.packing import Packing, last_of_lines, last_of_rows, stored
from pallas_kernels.attention import Coords


class Cache(NamedTuple):
    """State of a batch of rows between calls of the model.

    Attributes:
        layers: keys and values, first layer to last.
        pools: of each of `cache_kinds`, the pages that its layers share.
        length: real tokens of each row so far.
        dealt: the device, of those that share a row, that has its first page.
    """

    layers: tuple[LayerCache, ...]
    pools: tuple[Pool, ...]
    length: Int[Array, "B"]
    dealt: Int[Array, "B"]

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


def init_cache(
    config: Llama4Config,
    rows: int,
    capacity: int,
    dtype=jnp.float32,
    mesh=None,
    *,
    tokens: int | None = None,
    ring_tokens: int | None = None,
) -> Cache:
    """An empty cache, laid out over `mesh` if given.

    Args:
        capacity: tokens that a row can hold; a value of `round_capacity`.
        dtype: of keys and values, or one of FORMATS.
        mesh: default: the current mesh.
        tokens: that all rows together can hold, divided evenly among groups of rows on a mesh (see
            `row_groups`), each row with one run of positions; default: the capacity of each.
        ring_tokens: the same of rings, where rows share pages of the full cache; default: `tokens`.

    Raises:
        UserError: if the capacity cannot be dealt out over the mesh, or the format is unknown.
    """
    if round_capacity(capacity, mesh) != capacity:
        raise UserError(
            f"cache capacity {capacity} must be {round_capacity(capacity, mesh)} on this mesh."
        )
    mesh = current_mesh() if mesh is None else mesh
    return _maker(config, rows, capacity, dtype, tokens, ring_tokens, mesh)()


@functools.lru_cache(maxsize=64)  # so that caches alike share a compiled program
def _maker(config: Llama4Config, rows: int, capacity: int, dtype, tokens, ring_tokens, mesh):
    make = functools.partial(_empty, config, rows, capacity, dtype, (tokens, ring_tokens), mesh)
    if mesh is None:
        return make
    limits = {"tokens": tokens, "ring_tokens": ring_tokens}
    shapes = abstract_cache(config, rows, capacity, dtype, mesh, **limits)
    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))


def abstract_cache(
    config: Llama4Config,
    rows: int,
    capacity: int,
    dtype,
    mesh,
    *,
    tokens: int | None = None,
    ring_tokens: int | None = None,
) -> Cache:
    """ShapeDtypeStructs with shardings; arguments as for `init_cache`."""
    limits = tokens, ring_tokens
    shapes = jax.eval_shape(lambda: _empty(config, rows, capacity, dtype, limits, mesh))

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
    of_rows = row_spec(mesh, rows)
    return Cache(layers, pools, of_rows, of_rows)  # pyrefly: ignore  # specs for arrays


def _empty(config: Llama4Config, rows: int, capacity: int, dtype, limits, mesh) -> Cache:
    groups = row_groups(rows, mesh)
    limits = (None if tokens is None else -(-tokens // groups) for tokens in limits)
    room = Room(rows // groups, groups, slot_shards(mesh), capacity, *limits)
    sizes = {kind: kind.size(room) for kind in cache_kinds(config)}

    def layer(spec: AttentionSpec) -> LayerCache:
        size = sizes[cache_kind(spec)]
        heads, head_dim = config.num_key_value_heads, config.head_dim
        return empty_layer((size.stores * size.pages, heads, size.page, head_dim), dtype)

    pools = tuple(empty_pool(rows, *size) for size in sizes.values())
    layers = tuple(map(layer, config.attention_specs))
    return Cache(layers, pools, jnp.zeros(rows, jnp.int32), jnp.arange(rows, dtype=jnp.int32))


def restart_rows(cache: Cache, restart: Int[Array, "B"] | Bool[Array, "B"]) -> Cache:
    """Empties the rows where `restart` is true, and gives their pages back."""
    leaves = restart.astype(bool)

    def body(pools, leaves):
        return tuple(give_back(pool, leaves) for pool in pools)

    pools = _per_store(cache, body, lambda pools, rows: pools, leaves)
    own = jnp.arange(len(leaves), dtype=jnp.int32)
    length, dealt = jnp.where(leaves, 0, cache.length), jnp.where(leaves, own, cache.dealt)
    return cache._replace(pools=pools, length=length, dealt=dealt)


def truncate_rows(cache: Cache, length: Int[Array, "B"]) -> Cache:
    """The cache without the tokens of each row from a position on; drafts are taken back so.

    A token in a ring overwrites one that is a chunk, or a sliding window, before it. So the dropped
    tokens must be of one chunk with the last that stays; else, and with sliding windows always,
    keep a copy of the cache. Pages without a token are free again; what a row shares with others
    must stay.

    Args:
        cache: whose rows have one segment each, from position 0 on.
        length: tokens that stay, at most as many as there are.
    """

    def kept(pool: Pool, length) -> Pool:
        position, segment = pool.coords
        stays = (pool.owner < 0) | (position.T < length[jnp.maximum(pool.owner, 0)])
        left = Coords(position, jnp.where(stays.T, segment, 0))
        return give_back_empty(pool._replace(coords=left))

    def body(pools, length):
        return tuple(kept(pool, length) for pool in pools)

    pools = _per_store(cache, body, lambda pools, rows: pools, length)
    return cache._replace(pools=pools, length=length)


def plan_writes(
    config: Llama4Config, cache: Cache, new: Coords, packing: Packing | None = None
) -> tuple[dict[CacheKind, CacheStep], Cache]:
    """Where the new tokens go, by kind of cache, and the cache with all but its keys updated.

    Tokens beyond the capacity, or beyond the pages that are free, go nowhere: callers make sure
    that there is room.

    Args:
        new: coordinates of the new tokens, [B, S]; a row's segments are contiguous.
        packing: the rows that the tokens belong to; default: each line is a row's.

    Raises:
        UserError: if the cache was made for another number of devices along `sequence`.
    """
    kinds, shards = cache_kinds(config), slot_shards()
    packed = packing is not None and packing.pieces is not None
    in_lines = new.position.shape[1] == 1 or (packing is not None and not packed)

    def body(pools, length, dealt, new, packing):
        where = _arrivals(new, packing, length)
        dealt = dealt[where.row]
        written = []
        for kind, pool in zip(kinds, pools, strict=True):
            slots = kind.slots(new, where.last, where.order, dealt, shards)
            step = _write_tokens(pool, slots, new, where.row, packing)
            written.append(step._replace(before=None) if in_lines else step)
        return tuple(written), where.length

    def out_specs(pools, rows):
        return tuple(_step_spec(pool, packed, in_lines) for pool in pools), rows

    written, length = _per_store(cache, body, out_specs, cache.length, cache.dealt, new, packing)
    steps = dict(zip(kinds, written, strict=True))
    pools = tuple(step.pool for step in written)
    return steps, cache._replace(pools=pools, length=length)


class _Arrivals(NamedTuple):
    """The row of each new token, its place there, the row's last, and the rows' new lengths."""

    row: Int[Array, "L S"]
    order: Int[Array, "L S"]
    last: Coords
    length: Int[Array, "R"]


def _arrivals(new: Coords, packing: Packing | None, length: Int[Array, "R"]) -> _Arrivals:
    real = new.segment != 0
    if packing is None:
        row = jnp.broadcast_to(jnp.arange(len(length))[:, None], real.shape)
        order = length[:, None] + jnp.cumsum(real, axis=1) - 1
        last, length = last_of_lines(new), length + jnp.sum(real, axis=1)
    else:
        row, order = packing.row, new.position
        last = last_of_rows(new, row, len(length))
        length = length.at[row].max(jnp.where(real, order + 1, 0))
    return _Arrivals(row, jnp.where(real, order, -1), last, length)


def _write_tokens(
    pool: Pool, slots: jax.Array, new: Coords, row: jax.Array, packing: Packing | None
) -> CacheStep:
    """The pool with pages for the new tokens and their coordinates, and where they went."""
    before = pool.coords
    pool = take_pages(pool, slots, row)
    index = pool_index(pool, slots, row)
    pool = write_coords(pool, index, new if packing is None else stored(new))
    table, pieces = pool.table, None
    if packing is not None and packing.pieces is not None:
        pieces = _piece_table(table, packing.pieces)
    elif packing is not None:
        table = table[:, packing.row[:, 0]]
    return CacheStep(index[None], pool, before, table, pieces)


def _piece_table(table: Int[Array, "1 R n"], pieces: Int[Array, "1 N"]) -> PieceTable:
    """The pages of some rows in one list."""
    page = jnp.where(pieces[0, :, None] < 0, 0, table[0, pieces[0]])
    segment = jnp.broadcast_to(1 + jnp.arange(len(page))[:, None], page.shape)
    place = jnp.where(page != 0, jnp.cumsum(page != 0).reshape(page.shape) - 1, page.size)
    parts = (jnp.zeros(page.size, jnp.int32).at[place].set(x, mode="drop") for x in (page, segment))
    return PieceTable(*(x[None, None] for x in parts))


def step_spec(mesh, rows: int, sharded: bool, step: CacheStep) -> CacheStep:
    """Where a `CacheStep` lies: one of PartitionSpecs; arguments as for `pool_spec`."""
    pool = pool_spec(mesh, rows, sharded)
    return _step_spec(pool, step.pieces is not None, step.before is None)


def _step_spec(pool: Pool, packed: bool, in_lines: bool) -> CacheStep:
    table: Any = pool.table
    pieces = PieceTable(table, table) if packed else None
    return CacheStep(table, pool, None if in_lines else pool.coords, table, pieces)


def _per_store(cache: Cache, body, out_specs, *of_rows):
    """Runs `body(pools, *of_rows)` on each device's pools and rows.

    Args:
        out_specs: a function that makes the PartitionSpecs of the results from those of the pools
            and of rows.
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
    of_row = row_spec(mesh, rows)
    run = meshes.per_device(body, (specs, *(of_row for _ in of_rows)), out_specs(specs, of_row))
    return run(cache.pools, *of_rows)
