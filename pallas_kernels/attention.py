"""Blockwise attention over tokens that carry their own position and segment.

Runs on any backend: no score matrix of length x length, and blocks of keys that no query of a block
can see are skipped at run time, so causal, chunked and packed attention cost what they should.

Shape letters: B rows, H query heads, K key/value heads, G = H / K, S queries, T keys, d head size;
q and t are the sizes of one block of queries and of keys.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

HIGHEST = lax.Precision.HIGHEST
MASKED = -1e30  # finite, so that exp(score - running_max) never meets inf - inf


class Coords(NamedTuple):
    """Where tokens are. A token of segment 0 is padding: it sees nothing and nothing sees it."""

    position: Int[Array, "batch length"]
    segment: Int[Array, "batch length"]


@dataclasses.dataclass(frozen=True)
class _Static:
    scale: float
    chunk: int | None
    block_q: int
    block_k: int


def visible(q: Coords, k: Coords, chunk: int | None) -> jax.Array:
    """The attention rule, [B, S, T]: same segment, not later, and the same chunk if any."""
    q_position, k_position = q.position[:, :, None], k.position[:, None, :]
    q_segment, k_segment = q.segment[:, :, None], k.segment[:, None, :]
    allowed = (k_position <= q_position) & (k_segment == q_segment) & (k_segment != 0)
    if chunk is not None:
        allowed &= k_position // chunk == q_position // chunk
    return allowed


def flash_attention(
    q: Float[Array, "B H S d"],
    k: Float[Array, "B K T d"],
    v: Float[Array, "B K T d"],
    q_coords: Coords,
    k_coords: Coords,
    *,
    scale: float,
    chunk: int | None = None,
    block_q: int = 256,
    block_k: int = 512,
) -> tuple[Float[Array, "B H S d"], Float[Array, "B H S"]]:
    """Attention and the log-sum-exp of its scores, both differentiable.

    Softmax and accumulation are float32 whatever the inputs. A query that sees nothing gives zeros
    and a log-sum-exp of -inf, so partial results over disjoint keys combine with `merge`.

    Args:
        q, k, v: query head `h` reads key/value head `h // (H / K)`.
        q_coords, k_coords: positions and segments of the queries [B, S] and the keys [B, T].
        scale: multiplies the scores, usually d ** -0.5.
        chunk: tokens attend within the chunk `position // chunk` only; None for full causal.
        block_q, block_k: tile sizes; results do not depend on them beyond rounding.
    """
    B, H, S, d = q.shape
    K = k.shape[1]
    static = _Static(scale, chunk, min(block_q, S), min(block_k, k.shape[2]))
    q_coords, k_coords = (
        _pad_coords(c, b) for c, b in ((q_coords, static.block_q), (k_coords, static.block_k))
    )
    q_BKGSd = _pad(q, static.block_q).reshape(B, K, H // K, -1, d)
    k, v = _pad(k, static.block_k), _pad(v, static.block_k)
    out, lse = _flash(static, q_BKGSd, k, v, q_coords, k_coords)
    return out.reshape(B, H, -1, d)[:, :, :S], lse.reshape(B, H, -1)[:, :, :S]


def merge(
    parts: list[tuple[Float[Array, "B H S d"], Float[Array, "B H S"]]],
) -> Float[Array, "B H S d"]:
    """Combines attention over disjoint sets of keys, each given as (output, log-sum-exp)."""
    top = functools.reduce(jnp.maximum, (lse for _, lse in parts))
    weights = [lse_weight(lse, top) for _, lse in parts]
    total = sum(weights)
    mixed = sum(out * w[..., None] for (out, _), w in zip(parts, weights, strict=True))
    return (mixed / jnp.where(total == 0, 1, total)[..., None]).astype(parts[0][0].dtype)


def lse_weight(lse: jax.Array, top: jax.Array) -> jax.Array:
    """exp(lse - top), and 0 where nothing was seen, also when nothing was seen anywhere."""
    return jnp.where(lse == -jnp.inf, 0.0, jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top)))


def _pad(x: jax.Array, block: int) -> jax.Array:
    """Rounds the second-to-last dimension up to a multiple of `block`."""
    extra = -x.shape[-2] % block
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, extra), (0, 0)]) if extra else x


def _pad_coords(coords: Coords, block: int) -> Coords:
    extra = -coords.position.shape[1] % block
    return Coords(*(jnp.pad(c, ((0, 0), (0, extra))) for c in coords)) if extra else coords


def _bounds(coords: Coords, block: int):
    """Per row and block: smallest and largest position and segment of the real tokens."""
    position, segment = (c.reshape(c.shape[0], -1, block) for c in coords)
    real, big = segment != 0, jnp.iinfo(jnp.int32).max
    return [
        extreme(jnp.where(real, x, fill), axis=-1)
        for x in (position, segment)
        for extreme, fill in ((jnp.min, big), (jnp.max, -big))
    ]


def _block_pairs(static: _Static, q: Coords, k: Coords) -> jax.Array:
    """[query blocks, key blocks]: whether some query may see some key. Never false when one can."""
    q_first, q_last, q_low, q_high = (x[:, :, None] for x in _bounds(q, static.block_q))
    k_first, k_last, k_low, k_high = (x[:, None, :] for x in _bounds(k, static.block_k))
    possible = (k_first <= q_last) & (k_low <= q_high) & (k_high >= q_low)
    if static.chunk is not None:
        possible &= k_last // static.chunk >= q_first // static.chunk
    return jnp.any(possible, axis=0)


def _block(x: jax.Array, index: jax.Array, size: int, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _coords_block(coords: Coords, index: jax.Array, size: int) -> Coords:
    return Coords(*(_block(c, index, size, 1) for c in coords))


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, precision=HIGHEST, preferred_element_type=jnp.float32)


def _scores(static: _Static, q_BKGqd, k_BKtd, q: Coords, k: Coords):
    """Scaled scores [B, K, G, q, t] with MASKED where the rule forbids, and the rule itself."""
    allowed = visible(q, k, static.chunk)[:, None, None]
    scores = _dot("BKGqd,BKtd->BKGqt", q_BKGqd, k_BKtd) * static.scale
    return jnp.where(allowed, scores, MASKED), allowed


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(static: _Static, q, k, v, q_coords: Coords, k_coords: Coords):
    pairs = _block_pairs(static, q_coords, k_coords)

    def query_block(_, i):
        q_i = _block(q, i, static.block_q, 3)
        c_i = _coords_block(q_coords, i, static.block_q)
        return None, _attend_block(static, q_i, c_i, k, v, k_coords, pairs[i])

    _, (out, lse) = lax.scan(query_block, None, jnp.arange(pairs.shape[0]))
    return _join(out), _join(lse)


def _join(blocks: jax.Array) -> jax.Array:
    """[blocks, B, K, G, q, ...] to [B, K, G, S, ...]."""
    blocks = jnp.moveaxis(blocks, 0, 3)
    return blocks.reshape(*blocks.shape[:3], -1, *blocks.shape[5:])


def _attend_block(static: _Static, q_i, q_coords, k, v, k_coords, row_of_pairs):
    """One block of queries against all keys, with a running maximum and sum (online softmax)."""

    def step(state, j):
        k_j, v_j = (_block(x, j, static.block_k, 2) for x in (k, v))
        top, total, acc = state
        scores, allowed = _scores(
            static, q_i, k_j, q_coords, _coords_block(k_coords, j, static.block_k)
        )
        new_top = jnp.maximum(top, scores.max(-1))
        p = jnp.where(allowed, jnp.exp(scores - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        acc = acc * shrink[..., None] + _dot("BKGqt,BKtd->BKGqd", p.astype(v.dtype), v_j)
        return new_top, total * shrink + p.sum(-1), acc

    def visit(state, j):
        return lax.cond(row_of_pairs[j], step, lambda state, _: state, state, j), None

    rows = q_i.shape[:-1]
    start = (jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros(q_i.shape, jnp.float32))
    (top, total, acc), _ = lax.scan(visit, start, jnp.arange(row_of_pairs.shape[0]))
    seen = total > 0
    out = acc / jnp.where(seen, total, 1.0)[..., None]
    lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
    return out.astype(q_i.dtype), lse


def _flash_forward(static, q, k, v, q_coords, k_coords):
    out, lse = _flash(static, q, k, v, q_coords, k_coords)
    return (out, lse), (q, k, v, q_coords, k_coords, out, lse)


def _flash_backward(static, saved, cotangents):
    """Recomputes each block's probabilities from the log-sum-exp; keys outside, queries inside."""
    q, k, v, q_coords, k_coords, out, lse = saved
    d_out, d_lse = cotangents
    # dS = P * (dP - sum(dO * O) + dLSE); the last two are constant along the keys.
    constant = d_lse - jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)
    pairs = _block_pairs(static, q_coords, k_coords)

    def key_block(dq, j):
        k_j, v_j = (_block(x, j, static.block_k, 2) for x in (k, v))
        c_j = _coords_block(k_coords, j, static.block_k)

        def step(state, i):
            dq, dk_j, dv_j = state
            q_i, o_i = (_block(x, i, static.block_q, 3) for x in (q, d_out))
            lse_i, constant_i = (
                _block(x, i, static.block_q, 3)[..., None] for x in (lse, constant)
            )
            scores, allowed = _scores(
                static, q_i, k_j, _coords_block(q_coords, i, static.block_q), c_j
            )
            p = jnp.where(allowed, jnp.exp(scores - jnp.where(lse_i == -jnp.inf, 0.0, lse_i)), 0.0)
            ds = p * (_dot("BKGqd,BKtd->BKGqt", o_i, v_j) + constant_i) * static.scale
            ds = ds.astype(q.dtype)
            dq_i = _block(dq, i, static.block_q, 3) + _dot("BKGqt,BKtd->BKGqd", ds, k_j)
            dq = lax.dynamic_update_slice_in_dim(dq, dq_i, i * static.block_q, 3)
            dk_j += _dot("BKGqt,BKGqd->BKtd", ds, q_i)
            dv_j += _dot("BKGqt,BKGqd->BKtd", p.astype(q.dtype), o_i)
            return dq, dk_j, dv_j

        def visit(state, i):
            return lax.cond(pairs[i, j], step, lambda state, _: state, state, i), None

        zeros = jnp.zeros(k_j.shape, jnp.float32)
        (dq, dk_j, dv_j), _ = lax.scan(visit, (dq, zeros, zeros), jnp.arange(pairs.shape[0]))
        return dq, (dk_j.astype(k.dtype), dv_j.astype(v.dtype))

    dq, d_kv = lax.scan(key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(pairs.shape[1]))
    dk, dv = (jnp.moveaxis(x, 0, 2).reshape(k.shape) for x in d_kv)
    return dq.astype(q.dtype), dk, dv, None, None


_flash.defvjp(_flash_forward, _flash_backward)
