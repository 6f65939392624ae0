"""The cache: one chunk a row for local layers, the whole sequence for global layers, in pages.

Every slot carries the position and segment of its token, shared by all layers of a kind, so masks
never depend on where a token lies. Local layers keep a ring (slot = position % chunk). Global
layers keep a log: each row's real tokens in the order of arrival, whose pages are dealt out over
the devices of the `slots` axis, so that any prefix lies evenly on all of them. Rows take pages as
they grow: one row of ten million tokens and a hundred short ones need what they hold, no more.

Shape letters: B rows, K key/value heads, P pages, t tokens a page, d head size, S new tokens a row.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxmoe import mesh as meshes
from jaxmoe.config import LayerKind, Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.mesh import activation_axes, axis_size, current_mesh, sharding
from jaxmoe.model.pages import Pool, empty_pool, give_back, places, take_pages, write_coords
from pallas_kernels.attention import Coords
from pallas_kernels.quantized import LARGEST, Quantized, quantize

PAGE = 64  # tokens of a page
FORMATS = ("bf16", *LARGEST)  # of keys and values, by name


class LayerCache(NamedTuple):
    """Keys and values of one layer, [P, K, t, d]: arrays, or quantized with a scale a token."""

    k: Float[Array, "P K t d"] | Quantized
    v: Float[Array, "P K t d"] | Quantized


class Cache(NamedTuple):
    """State of a batch of rows between calls of the model."""

    layers: tuple[LayerCache, ...]
    ring: Pool  # of the local layers
    log: Pool  # of the global layers
    length: Int[Array, "B"]  # real tokens in the log


class Writes(NamedTuple):
    """Places in a device's pool that the new tokens go to; beyond it for those that go nowhere."""

    ring: Int[Array, "1 B S"]
    log: Int[Array, "shards B S"]


def keeps_ring(config: Llama4Config, kind: LayerKind) -> bool:
    """Whether a layer keeps one chunk; otherwise it keeps the sequence."""
    return kind.attention == "local" and config.has_local_ring


def slot_shards(mesh=None) -> int:
    """How many devices share a row's log on `mesh`, by default the current one."""
    mesh = current_mesh() if mesh is None else mesh
    return 1 if mesh is None else axis_size(mesh, "slots")


def round_capacity(tokens: int, mesh=None) -> int:
    """The smallest capacity that holds `tokens` tokens a row on `mesh` or the current one."""
    unit = PAGE * slot_shards(mesh)
    return -(-tokens // unit) * unit


def capacity_of(cache: Cache) -> int:
    """Tokens that a row can hold."""
    shards, _, columns = cache.log.table.shape
    return shards * columns * PAGE


def row_groups(rows: int, mesh=None) -> int:
    """Into how many groups a batch's rows are spread; each has pages of its own."""
    mesh = current_mesh() if mesh is None else mesh
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in _row_axes(mesh, rows))


def pages_for(tokens: int, mesh=None) -> int:
    """Pages of global layers that so many tokens of a row take on each of its devices, at most."""
    return -(-tokens // (PAGE * slot_shards(mesh)))


def ring_page(config: Llama4Config) -> int:
    """Tokens of a page of the ring, which divides a chunk; without chunks, of a ring of nobody."""
    chunk = config.attention_chunk_size or 1
    return PAGE if chunk % PAGE == 0 else chunk


class _Sizes(NamedTuple):
    """Of a pool: columns of a row's table, pages and tokens of a page, and how it is spread."""

    columns: int
    pages: int
    page: int
    stores: int
    shards: int


def _sizes(config: Llama4Config, rows: int, capacity: int, tokens: int | None, mesh):
    """Of the ring's and of the log's pool; page 0 of each store included."""
    groups, shards, page = row_groups(rows, mesh), slot_shards(mesh), ring_page(config)
    rows //= groups
    columns, widest = (config.attention_chunk_size or page) // page, capacity // (PAGE * shards)
    ring, log = rows * columns, rows * widest
    if tokens is not None:
        held = pages_for(-(-tokens // groups), mesh) + rows  # each row may begin a page
        log = max(widest, min(log, held))
        # What fits in the log fits in the ring too; its first and last page may be begun.
        ring = max(columns, min(ring, -(-log * PAGE * shards // page) + 2 * rows))
    return (
        _Sizes(columns, 1 + ring, page, groups, 1),
        _Sizes(widest, 1 + log, PAGE, groups * shards, shards),
    )


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
        tokens: that all rows together can hold, spread evenly over groups of rows on a mesh (see
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

    def placed(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, spec))

    return jax.tree.map(placed, shapes, cache_specs(config, shapes, mesh))


def cache_specs(config: Llama4Config, cache: Cache, mesh) -> Cache:
    """Where each array of a cache lies on a mesh."""
    rows = cache.length.shape[0]
    ring, log = (pool_spec(mesh, rows, spread) for spread in (False, True))
    layers = tuple(
        jax.tree.map(functools.partial(keys_spec, mesh, rows, not keeps_ring(config, kind)), layer)
        for kind, layer in zip(config.layers, cache.layers, strict=True)
    )
    length = meshes.spread_spec(mesh, _row_axes(mesh, rows))
    return Cache(layers, ring, log, length)  # pyrefly: ignore  # specs for arrays


def pool_spec(mesh, rows: int, spread: bool) -> Pool:
    """Where a pool lies; `spread` over the `slots` axis, as the log is, or not."""
    row_axes, slots = _row_axes(mesh, rows), _slot_axes(spread)
    pages = meshes.spread_spec(mesh, (*row_axes, *slots))
    table = meshes.spread_spec(mesh, slots, row_axes)
    return Pool(Coords(pages, pages), pages, table)  # pyrefly: ignore  # specs for arrays


def keys_spec(mesh, rows: int, spread: bool, x) -> PartitionSpec:
    """Where keys or values [P, K, t, ...] or their scales lie."""
    pages = (*_row_axes(mesh, rows), *_slot_axes(spread))
    return meshes.spread_spec(mesh, pages, activation_axes(mesh, "kv_heads", x.shape[1]))


def _slot_axes(spread: bool) -> tuple[str, ...]:
    return meshes.RULES["slots"] if spread else ()


def _row_axes(mesh, rows: int) -> tuple[str, ...]:
    return activation_axes(mesh, "batch", rows)


def _empty(config: Llama4Config, rows: int, capacity: int, dtype, tokens, mesh) -> Cache:
    ring, log = _sizes(config, rows, capacity, tokens, mesh)

    def layer(kind):
        size = ring if keeps_ring(config, kind) else log
        pages = size.stores * size.pages
        shape = (pages, config.num_key_value_heads, size.page, config.head_dim)
        return LayerCache(_no_keys(shape, dtype), _no_keys(shape, dtype))

    ring_pool, log_pool = (empty_pool(rows, *size) for size in (ring, log))
    layers = tuple(layer(kind) for kind in config.layers)
    return Cache(layers, ring_pool, log_pool, jnp.zeros(rows, jnp.int32))


def _no_keys(shape: tuple[int, ...], dtype):
    if isinstance(dtype, str) and dtype in LARGEST:
        stored = jax.eval_shape(
            lambda x: quantize(x, dtype), jax.ShapeDtypeStruct(shape, "float32")
        )
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stored)
    if isinstance(dtype, str) and dtype not in ("bf16", "bfloat16", "float32", "float16"):
        raise UserError(f"cache format '{dtype}' is unknown; there are {', '.join(FORMATS)}.")
    return jnp.zeros(shape, jnp.bfloat16 if dtype == "bf16" else dtype)


def restart_rows(cache: Cache, restart: Int[Array, "B"] | Bool[Array, "B"]) -> Cache:
    """Empties the rows where `restart` is true, and gives their pages back."""
    leaves = restart.astype(bool)

    def body(ring, log, leaves):
        return give_back(ring, leaves), give_back(log, leaves)

    ring, log = _per_store(cache, body, leaves)
    return cache._replace(ring=ring, log=log, length=jnp.where(leaves, 0, cache.length))


def pages_a_group(cache: Cache) -> int:
    """Pages of global layers that the rows of a group share, on each of their devices."""
    shards, rows, _ = cache.log.table.shape
    return len(cache.log.owner) // (shards * row_groups(rows)) - 1


def plan_writes(cache: Cache, new: Coords) -> tuple[Writes, Cache]:
    """Where the new tokens go, and the cache with all but its keys updated.

    Tokens beyond the capacity, or beyond the pages that are free, go nowhere: callers make sure
    that there is room.

    Args:
        new: coordinates of the new tokens, [B, S]; a row's segments are contiguous.

    Raises:
        UserError: if the cache was made for another number of devices along `sequence`.
    """
    shards = slot_shards()
    real = new.segment != 0
    slot = jnp.where(real, cache.length[:, None] + jnp.cumsum(real, axis=1) - 1, -1)

    def body(ring, log, new, slot):
        ring, ring_places = _write_tokens(ring, _ring_slots(ring, new), new)
        log, log_places = _write_tokens(log, _slots_here(slot, shards), new)
        return ring, log, ring_places[None], log_places[None]

    ring, log, *writes = _per_store(cache, body, new, slot)
    cache = cache._replace(ring=ring, log=log, length=cache.length + jnp.sum(real, axis=1))
    return Writes(*writes), cache


def _write_tokens(pool: Pool, slots, new: Coords) -> tuple[Pool, jax.Array]:
    """The pool with pages for the new tokens and their coordinates, and their places."""
    pool = take_pages(pool, slots)
    where = places(pool, slots)
    return write_coords(pool, where, new), where


def _per_store(cache: Cache, body, *of_rows):
    """Runs `body(ring, log, *of_rows)` on each device's pools and rows.

    It returns both pools, and for any further result one a pool, [1, B, ...].
    """
    shards, made_for = slot_shards(), cache.log.table.shape[0]
    if shards != made_for:
        raise UserError(
            f"a cache that is dealt out over {made_for} device(s) is used on a mesh with {shards}; "
            "make it with init_cache under the mesh it is used on."
        )
    mesh = current_mesh()
    if mesh is None:
        return body(cache.ring, cache.log, *of_rows)
    rows = cache.length.shape[0]
    ring, log = (pool_spec(mesh, rows, spread) for spread in (False, True))
    row_spec = meshes.spread_spec(mesh, _row_axes(mesh, rows))
    specs = (ring, log, *(row_spec for _ in of_rows))
    outs = (ring, log) if len(of_rows) == 1 else (ring, log, ring.table, log.table)
    return meshes.per_device(body, specs, outs)(cache.ring, cache.log, *of_rows)


def _slots_here(slot: jax.Array, shards: int) -> jax.Array:
    """Slots [B, S] of the log counted over this device's pages of the row; -1 for those elsewhere.

    A row's pages are dealt out in turn, every row's from another device on.
    """
    if shards == 1:
        return slot
    page, me = slot // PAGE, jax.lax.axis_index(meshes.RULES["slots"])
    turn = (page + jnp.arange(slot.shape[0])[:, None]) % shards
    here = (slot >= 0) & (turn == me)
    return jnp.where(here, page // shards * PAGE + slot % PAGE, -1)


def _ring_slots(pool: Pool, new: Coords) -> jax.Array:
    """Of tokens of the chunk that the row ends in: the only ones that a later token may see."""
    chunk = pool.table.shape[2] * pool.coords.segment.shape[1]
    real = new.segment != 0
    order = jnp.arange(real.shape[1])
    last = jnp.max(jnp.where(real, order, 0), axis=1, keepdims=True)
    position, segment = (jnp.take_along_axis(c, last, axis=1) for c in new)
    same = (new.segment == segment) & (new.position // chunk == position // chunk)
    return jnp.where(real & same, new.position % chunk, -1)


def write(keys, new: Float[Array, "B K S d"], where: Int[Array, "B S"]):
    """Puts new keys or values, quantized if the cache is, in their places."""
    stored = quantize(new, keys.format) if isinstance(keys, Quantized) else new

    def put(leaf, x):
        page = leaf.shape[2]
        x = jnp.swapaxes(x, 1, 2).astype(leaf.dtype)
        return leaf.at[where // page, :, where % page].set(x, mode="drop")

    return jax.tree.map(put, keys, stored)
