"""Llama 4 attention: chunked rotary (local) and NoPE with temperature (global), cached or not.

Shape letters: B rows, S new tokens, D embed, H query heads, K key/value heads, d head size.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxmoe import mesh as meshes
from jaxmoe.config import LayerKind, Llama4Config
from jaxmoe.model.cache import (
    PAGE,
    Cache,
    LayerCache,
    Writes,
    keeps_ring,
    keys_spec,
    plan_writes,
    pool_spec,
    write,
)
from jaxmoe.model.kernels import FASTEST, Kernels
from jaxmoe.model.layers import linear, rms_normalize, rope_angles, rotate, temperature
from jaxmoe.model.pages import Pool
from pallas_kernels.arrays import pad_axis
from pallas_kernels.attention import (
    Coords,
    decode_attention,
    flash_attention,
    lse_weight,
    merge,
    merge_with_lse,
    rows_of_pages,
)
from pallas_kernels.quantized import Quantized, dequantize

PIECE = 2**16  # keys of a log, of all rows together, that a long step attends to at once
FEW_QUERIES = 4  # up to so many a row, the cache is read at memory speed rather than in tiles


class CacheStep(NamedTuple):
    """Where the new tokens go, what the ring held before, and what both pools hold after."""

    writes: Writes
    old_ring: Coords
    ring: Pool
    log: Pool


class NewTokens(NamedTuple):
    """Where a call's tokens are, on a device and on all that hold the same rows.

    `meet`: whether local layers need tokens of another device; None where nobody looked.
    """

    own: Coords
    all: Coords
    meet: Bool[Array, ""] | None


class Step(NamedTuple):
    """What all layers share in one call of the model."""

    tokens: NewTokens
    rope: tuple[Float[Array, "B S half"], Float[Array, "B S half"]]
    temperature: Float[Array, "B S"]
    cache: CacheStep | None


def start_step(
    config: Llama4Config, coords: Coords, cache: Cache | None
) -> tuple[Step, Cache | None]:
    """Everything that depends on positions, computed once a call."""
    everyone = Coords(*(meshes.constrain(x, "batch", None) for x in coords))
    tokens = NewTokens(coords, everyone, _chunks_meet(config, everyone, cache is not None))
    rope, scale = rope_angles(config, coords.position), temperature(config, coords.position)
    if cache is None:
        return Step(tokens, rope, scale, None), None
    writes, updated = plan_writes(cache, coords)
    cache_step = CacheStep(writes, cache.ring.coords, updated.ring, updated.log)
    return Step(tokens, rope, scale, cache_step), updated


def _chunks_meet(config: Llama4Config, coords: Coords, cached: bool) -> jax.Array | None:
    """Whether two devices hold new tokens of one chunk, or a cache has to keep a begun chunk.

    Nobody looks unless each device holds whole chunks, as many as it has room for.
    """
    mesh, chunk = meshes.current_mesh(), config.attention_chunk_size
    if mesh is None or chunk is None:
        return None
    length = coords.segment.shape[1]
    axes = meshes.activation_axes(mesh, "length", length)
    held = length // math.prod(mesh.shape[axis] for axis in axes)
    if not axes or held % chunk:
        return None
    order, real = jnp.arange(length), coords.segment != 0
    last = lax.cummax(jnp.where(real, order, -1), axis=1)  # real token up to each
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)

    def differs(x):
        return jnp.take_along_axis(x, jnp.maximum(before, 0), axis=1) != x

    apart = differs(coords.segment) | differs(coords.position // chunk) | (before < 0)
    meet = jnp.any(real & ~apart & (before // held != order // held))
    if not cached:
        return meet
    end = jnp.take_along_axis(coords.position, last[:, -1:], axis=1)
    return meet | jnp.any((last[:, -1:] >= 0) & ((end + 1) % chunk != 0))


def attention(
    config: Llama4Config,
    kind: LayerKind,
    p: dict,
    x: Float[Array, "B S D"],
    step: Step,
    cache: LayerCache | None,
    kernels: Kernels = FASTEST,
) -> tuple[Float[Array, "B S D"], LayerCache | None]:
    """One attention block, without its norm and residual."""
    q = linear("BSD,DHd->BSHd", x, p["q"], config.head_dim)
    k = linear("BSD,DKd->BSKd", x, p["k"], config.head_dim)
    v = linear("BSD,DKd->BSKd", x, p["v"], config.head_dim)
    if kind.attention == "local":
        q, k = rotate(q, *step.rope), rotate(k, *step.rope)
        if config.use_qk_norm:
            q, k = (rms_normalize(z, config.rms_norm_eps) for z in (q, k))
    else:
        q = (q.astype(jnp.float32) * step.temperature[..., None, None]).astype(x.dtype)
    q, k, v = (jnp.swapaxes(z, 1, 2) for z in (q, k, v))
    out, cache = attend(config, kind, q, k, v, step, cache, kernels)
    return linear("BHSd,HdD->BSD", out, p["o"]), cache


def attend(
    config: Llama4Config,
    kind: LayerKind,
    q: Float[Array, "B H S d"],
    k: Float[Array, "B K S d"],
    v: Float[Array, "B K S d"],
    step: Step,
    cache: LayerCache | None,
    kernels: Kernels = FASTEST,
) -> tuple[Float[Array, "B H S d"], LayerCache | None]:
    """Attention of the new tokens to themselves and to the cache, on any mesh."""
    local = kind.attention == "local"
    rule = {
        "scale": config.head_dim**-0.5,
        "chunk": config.attention_chunk_size if local else None,
        "implementation": kernels.attention,
    }
    if cache is None or step.cache is None:
        return _per_device(_attend_new, rule, q, k, v, step.tokens), None
    writes, old_ring, ring, log = step.cache
    if keeps_ring(config, kind):
        state = (cache, writes.ring, ring, old_ring)
        return _per_device(_attend_ring, rule, q, k, v, step.tokens, *state)
    return _per_device(_attend_log, rule, q, k, v, step.tokens, cache, writes.log, log)


def _per_device(body, rule, q, k, v, tokens, *state):
    """Runs `body` on each device's part of the rows, heads, new tokens and pages."""
    mesh = meshes.current_mesh()
    if mesh is None:
        return body(rule, (), q, k, v, tokens, *state)

    def specs(tree, *axes):
        return jax.tree.map(lambda x: meshes.activation_spec(mesh, axes, x.shape), tree)

    q_spec = specs(q, "batch", "heads", "length", None)
    kv_specs = specs((k, v), "batch", "kv_heads", "length", None)
    tokens_spec = NewTokens(
        specs(tokens.own, "batch", "length"), specs(tokens.all, "batch", None), specs(tokens.meet)
    )
    in_specs, out_specs = (q_spec, *kv_specs, tokens_spec), q_spec
    if state:
        cache, _, _, *old_coords = state
        where = (mesh, q.shape[0], body is _attend_log)
        cache_spec, pool = (
            jax.tree.map(functools.partial(keys_spec, *where), cache),
            pool_spec(*where),
        )
        in_specs += (cache_spec, pool.table, pool, *(pool.coords for _ in old_coords))
        out_specs = (q_spec, cache_spec)
    axes = meshes.activation_axes(mesh, "length", q.shape[2])
    run = meshes.per_device(functools.partial(body, rule, axes), in_specs, out_specs)
    return run(q, k, v, tokens, *state)


def _gather(x, axes: tuple[str, ...], needed: jax.Array | None = None):
    """All new tokens' part of x [B, K, S, d], of which the devices of `axes` hold a part each.

    Where it is not `needed`, only this device's part is there, the rest is zeros.
    """

    def gather(x):
        return lax.all_gather(x, axes, axis=2, tiled=True)

    def place(x):
        rows, heads, own, size = x.shape
        whole = jnp.zeros((rows, heads, own * lax.axis_size(axes), size), x.dtype)
        return lax.dynamic_update_slice_in_dim(whole, x, own * lax.axis_index(axes), 2)

    if not axes:
        return x
    if needed is None:
        return jax.tree.map(gather, x)
    return lax.cond(needed, *(functools.partial(jax.tree.map, f) for f in (gather, place)), x)


def _attend_new(rule, axes, q, k, v, tokens):
    """No cache. Devices that hold part of the tokens each gather all keys that they may need."""
    k, v = _gather((k, v), axes, tokens.meet if rule["chunk"] else None)
    return flash_attention(q, k, v, tokens.own, tokens.all, in_order=not axes, **rule)


def _attend_ring(rule, axes, q, k, v, tokens, cache, where, ring, old_coords):
    """Local layers: the chunk so far is in the ring, the rest of it among the new tokens.

    Where no chunks meet, each device's ring holds other keys of a chunk that nobody sees again.
    """
    k, v = _gather((k, v), axes, tokens.meet)
    new_cache = LayerCache(*(write(x, new, where[0]) for x, new in zip(cache, (k, v), strict=True)))
    table = ring.table[0]
    if k.shape[2] == 1:  # once written, the token's whole chunk is in the ring
        out = decode_attention(q, *new_cache, tokens.own, ring.coords, table=table, **rule)
        return out, new_cache
    past = _attend_pages(rule, q, cache, tokens.own, old_coords, table)
    rule = rule | {"in_order": not axes, "return_lse": True}
    present = flash_attention(q, k, v, tokens.own, tokens.all, **rule)
    out = merge([past, present])  # pyrefly: ignore  # pairs, since return_lse
    # Together, or the compiler writes all layers' rings last and keeps their keys until then.
    return lax.optimization_barrier((out, new_cache))


def _attend_log(rule, axes, q, k, v, tokens, cache, where, log):
    """Global layers: write first, then attend to this device's pages and merge over devices."""
    k, v, q = _gather((k, v, q), axes)
    cache = LayerCache(*(write(x, new, where[0]) for x, new in zip(cache, (k, v), strict=True)))
    new, table = tokens.all, log.table[0]
    if q.shape[2] <= FEW_QUERIES:
        out, lse = decode_attention(
            q, *cache, new, log.coords, table=table, return_lse=True, **rule
        )
    else:
        out, lse = _attend_log_in_pieces(rule, q, cache, new, log.coords, table)
    return merge_over_devices(out, lse, axes).astype(q.dtype), cache


def _attend_pages(rule, q, cache, coords, page_coords, table):
    """Attention to all keys in the pages of a table, and its log-sum-exp."""
    *keys, key_coords = rows_of_pages(cache.k, cache.v, page_coords, table)
    k, v = (dequantize(x, q.dtype) if isinstance(x, Quantized) else x.astype(q.dtype) for x in keys)
    return flash_attention(q, k, v, coords, key_coords, return_lse=True, **rule)


def _attend_log_in_pieces(rule, q, cache, coords, page_coords, table):
    """The same, some columns of the table at a time: memory does not grow with the log."""
    columns = min(max(1, PIECE // (PAGE * len(table))), table.shape[1])
    table = pad_axis(table, 1, columns)
    used = jnp.max(jnp.where(table != 0, jnp.arange(table.shape[1]) + 1, 0))

    def attend(piece):
        some = lax.dynamic_slice_in_dim(table, piece * columns, columns, 1)
        out, lse = _attend_pages(rule, q, cache, coords, page_coords, some)
        return out.astype(jnp.float32), lse

    def add(piece, state):
        return merge_with_lse([state, attend(piece)])

    if table.shape[1] == columns:
        return attend(0)
    return lax.fori_loop(1, -(-used // columns), add, attend(0))


def merge_over_devices(
    out: Float[Array, "B H S d"], lse: Float[Array, "B H S"], token_axes: tuple[str, ...] = ()
) -> Float[Array, "B H own d"]:
    """Sums attention over the devices that hold a part of each row's slots.

    Args:
        token_axes: the mesh axes that new tokens are spread over; each device keeps its own.
    """
    slot_axes = meshes.spread_axes("slots")
    if not slot_axes:
        return out
    weight = lse_weight(lse, lax.pmax(lse, slot_axes))[..., None]
    parts = (out.astype(jnp.float32) * weight, weight)
    if token_axes:
        add = functools.partial(lax.psum_scatter, scatter_dimension=2, tiled=True)
        total, norm = (add(x, slot_axes) for x in parts)
    else:
        total, norm = (lax.psum(x, slot_axes) for x in parts)
    return (total / jnp.where(norm == 0, 1, norm)).astype(out.dtype)
