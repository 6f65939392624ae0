"""The cache: one chunk a row for local layers, the whole sequence for global layers.

Every slot carries the position and segment of its token, shared by all layers of a kind, so masks
never depend on where a token lies. Local layers keep a ring (slot = position % chunk). Global
layers keep a log: each row's real tokens in the order of arrival, dealt out in blocks over the
devices of the `slots` axis, so that any prefix lies evenly on all of them.

Shape letters: B rows, K key/value heads, T slots, d head size, S new tokens a row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.config import LayerKind, Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.mesh import activation_spec, axis_size, current_mesh, sharding
from pallas_kernels.attention import Coords

DEAL = 64  # slots of the log that go to one device before the next device's turn
KEY_BLOCK = 512  # slots that attention reads at once


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    k: Float[Array, "B K T d"]
    v: Float[Array, "B K T d"]


class Cache(NamedTuple):
    """State of a batch of rows between calls of the model."""

    layers: tuple[LayerCache, ...]
    ring: Coords  # [B, chunk]: what the local layers' slots hold
    log: Coords  # [B, capacity]: what the global layers' slots hold
    length: Int[Array, "B"]  # real tokens in the log


class Writes(NamedTuple):
    """The slots that the new tokens go to; one past the last slot for tokens that go nowhere."""

    ring: Int[Array, "B S"]
    log: Int[Array, "B S"]


def keeps_ring(config: Llama4Config, kind: LayerKind) -> bool:
    """Whether a layer keeps one chunk; otherwise it keeps the sequence."""
    return kind.attention == "local" and config.has_local_ring


def slot_shards(mesh=None) -> int:
    """How many devices share a row's log on `mesh`, by default the current one."""
    mesh = current_mesh() if mesh is None else mesh
    return 1 if mesh is None else axis_size(mesh, "slots")


def round_capacity(tokens: int, mesh=None) -> int:
    """The smallest good capacity that holds `tokens` tokens a row on `mesh` or the current one.

    Attention reads keys in blocks of up to 512 slots, and would copy a cache of another multiple.
    """
    shards = slot_shards(mesh)
    unit = DEAL * shards if tokens <= KEY_BLOCK * shards else KEY_BLOCK * shards
    return -(-tokens // unit) * unit


def init_cache(
    config: Llama4Config, rows: int, capacity: int, dtype=jnp.float32, mesh=None
) -> Cache:
    """An empty cache, laid out over `mesh` if given.

    Args:
        capacity: tokens a row can hold; a value of `round_capacity`.
        mesh: default: the current mesh.

    Raises:
        UserError: if the capacity cannot be dealt out over the mesh.
    """
    if round_capacity(capacity, mesh) != capacity:
        raise UserError(
            f"cache capacity {capacity} must be {round_capacity(capacity, mesh)} on this mesh."
        )
    mesh = current_mesh() if mesh is None else mesh
    if mesh is None:
        return _zeros(config, rows, capacity, dtype)
    shapes = abstract_cache(config, rows, capacity, dtype, mesh)
    make = jax.jit(
        lambda: _zeros(config, rows, capacity, dtype),
        out_shardings=jax.tree.map(lambda x: x.sharding, shapes),
    )
    return make()


def abstract_cache(config: Llama4Config, rows: int, capacity: int, dtype, mesh) -> Cache:
    """ShapeDtypeStructs with shardings."""
    shapes = jax.eval_shape(lambda: _zeros(config, rows, capacity, dtype))

    def lay(tree, *axes):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=sharding(mesh, activation_spec(mesh, axes, x.shape))
            ),
            tree,
        )

    layers = [
        lay(layer, "batch", "kv_heads", _slots_axis(config, kind), None)
        for kind, layer in zip(config.layers, shapes.layers, strict=True)
    ]
    return Cache(
        tuple(layers),
        lay(shapes.ring, "batch", None),
        lay(shapes.log, "batch", "slots"),
        lay(shapes.length, "batch"),
    )


def _slots_axis(config: Llama4Config, kind: LayerKind) -> str | None:
    return None if keeps_ring(config, kind) else "slots"


def _zeros(config: Llama4Config, rows: int, capacity: int, dtype) -> Cache:
    chunk = config.attention_chunk_size or 0

    def layer(kind):
        slots = chunk if keeps_ring(config, kind) else capacity
        shape = (rows, config.num_key_value_heads, slots, config.head_dim)
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def coords(slots):
        return Coords(*(jnp.zeros((rows, slots), jnp.int32) for _ in range(2)))

    return Cache(
        tuple(layer(kind) for kind in config.layers),
        coords(chunk),
        coords(capacity),
        jnp.zeros(rows, jnp.int32),
    )


def restart_rows(cache: Cache, restart: Int[Array, "B"]) -> Cache:
    """Empties the rows where `restart` is true, ready for another sequence; keys stay unseen."""
    keep = jnp.where(restart, 0, 1)

    def clear(coords):
        return Coords(coords.position, coords.segment * keep[:, None])

    return cache._replace(ring=clear(cache.ring), log=clear(cache.log), length=cache.length * keep)


def plan_writes(cache: Cache, new: Coords) -> tuple[Writes, Cache]:
    """Where the new tokens go, and the cache with its coordinates (not yet its keys) updated.

    Tokens beyond the capacity go nowhere: callers check `length` against it.

    Args:
        new: coordinates of the new tokens, [B, S]; a row's segments are contiguous.

    Raises:
        UserError: if the cache was made for another mesh.
    """
    capacity, chunk = cache.log.position.shape[1], cache.ring.position.shape[1]
    shards = slot_shards()
    if capacity % (DEAL * shards):
        raise UserError(
            f"a cache of {capacity} slots cannot be dealt out over {shards} devices; "
            "make it with init_cache under the mesh it is used on."
        )
    real = new.segment != 0
    slot = cache.length[:, None] + jnp.cumsum(real, axis=1) - 1
    log = jnp.where(real & (slot < capacity), deal_out(slot, capacity, shards), capacity)
    ring = jnp.where(_in_last_chunk(new, real, chunk), new.position % max(chunk, 1), chunk)
    cache = cache._replace(
        ring=_write_coords(cache.ring, ring, new),
        log=_write_coords(cache.log, log, new),
        length=cache.length + jnp.sum(real, axis=1),
    )
    return Writes(ring, log), cache


def deal_out(slot: jax.Array, capacity: int, shards: int) -> jax.Array:
    """The place of a log slot when blocks of DEAL slots are dealt to the shards in turn."""
    block, within = slot // DEAL, slot % DEAL
    return block % shards * (capacity // shards) + block // shards * DEAL + within


def _in_last_chunk(new: Coords, real: jax.Array, chunk: int) -> jax.Array:
    """Tokens of the chunk that the row ends in: the only ones that a later token may see."""
    if not chunk:
        return jnp.zeros_like(real)
    order = jnp.arange(real.shape[1])
    last = jnp.max(jnp.where(real, order, 0), axis=1, keepdims=True)
    position, segment = (jnp.take_along_axis(c, last, axis=1) for c in new)
    return real & (new.segment == segment) & (new.position // chunk == position // chunk)


def _write_coords(coords: Coords, slots: jax.Array, new: Coords) -> Coords:
    rows = jnp.arange(slots.shape[0])[:, None]
    return Coords(
        *(old.at[rows, slots].set(x, mode="drop") for old, x in zip(coords, new, strict=True))
    )


def write(
    cache: Float[Array, "B K T d"], new: Float[Array, "B K S d"], slots: Int[Array, "B S"]
) -> Float[Array, "B K T d"]:
    """Puts new keys or values in their slots; a slot outside [0, T) drops its token."""
    slots = jnp.where(slots < 0, cache.shape[2], slots)
    rows = jnp.arange(slots.shape[0])[:, None]
    values = jnp.swapaxes(new, 1, 2).astype(cache.dtype)
    return cache.at[rows, :, slots].set(values, mode="drop")
