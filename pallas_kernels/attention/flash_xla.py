"""Flash attention in plain JAX: the reference, and the path of CPUs and of other GPUs.

No score matrix of length x length, and blocks of keys that no query of a block can see are skipped
at run time, so causal, chunked and packed attention cost what they should.

Shape letters: B rows, H query heads, K key/value heads, G = H / K, S queries, T keys, d head size;
q and t are the sizes of one block of queries and of keys.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.arrays import pad_axis
from pallas_kernels.attention.masks import Coords, Reach, extents, meets, pad_tokens, reach, visible
from pallas_kernels.choice import Implementation

HIGHEST = lax.Precision.HIGHEST
MASKED = -1e30  # finite, so that exp(score - running_max) never meets inf - inf


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes; results do not depend on them beyond rounding."""

    block_q: int = 256
    block_k: int = 512


@dataclasses.dataclass(frozen=True)
class _Static:
    scale: float
    block_q: int
    block_k: int


def flash_xla(q, k, v, q_coords: Coords, k_coords: Coords, case, config: Config):
    """Output [B, H, S, d] and log-sum-exp [B, H, S], both differentiable."""
    B, H, S, d = q.shape
    K = k.shape[1]
    static = _Static(case.scale, min(config.block_q, S), min(config.block_k, k.shape[2]))
    q_reach = reach(q_coords, causal=case.causal, chunk=case.chunk)
    q_reach = pad_tokens(q_reach, static.block_q)
    k_coords = pad_tokens(k_coords, static.block_k)
    q_BKGSd = pad_axis(q, 2, static.block_q).reshape(B, K, H // K, -1, d)
    k, v = (pad_axis(x, 2, static.block_k) for x in (k, v))
    out, lse = _flash(static, q_BKGSd, k, v, q_reach, k_coords)
    return out.reshape(B, H, -1, d)[:, :, :S], lse.reshape(B, H, -1)[:, :, :S]


def _block_pairs(static: _Static, q: Reach, k: Coords) -> jax.Array:
    """[query blocks, key blocks]: whether some query of some row may see some key."""
    some, _ = meets(q, extents(k, static.block_k), static.block_q)
    return jnp.any(some, axis=0)


def _block(x: jax.Array, index: jax.Array, size: int, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _tokens_block(tokens, index: jax.Array, size: int):
    return jax.tree.map(lambda x: _block(x, index, size, 1), tokens)


def _keep(x: jax.Array, kept: jax.Array) -> jax.Array:
    """x with zeros where tokens are not kept: a probability of 0 times NaN would be NaN."""
    return jnp.where(kept, x, jnp.zeros((), x.dtype))


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, precision=HIGHEST, preferred_element_type=jnp.float32)


def _real(k: Coords) -> jax.Array:
    """Of keys [B, K, t, d], which are no padding."""
    return (k.segment != 0)[:, None, :, None]


def _scores(scale: float, q_BKGqd, k_BKtd, q: Reach, k: Coords):
    """Scaled scores [B, K, G, q, t] with MASKED where the rule forbids, and the rule itself."""
    allowed = visible(q, k)[:, None, None]
    scores = _dot("BKGqd,BKtd->BKGqt", q_BKGqd, k_BKtd) * scale
    return jnp.where(allowed, scores, MASKED), allowed


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(static: _Static, q, k, v, q_reach: Reach, k_coords: Coords):
    pairs = _block_pairs(static, q_reach, k_coords)

    def keys_of(j):
        k_j, v_j = (_block(x, j, static.block_k, 2) for x in (k, v))
        c_j = _tokens_block(k_coords, j, static.block_k)
        return k_j, _keep(v_j, _real(c_j)), c_j

    def query_block(_, i):
        q_i = _block(q, i, static.block_q, 3)
        c_i = _tokens_block(q_reach, i, static.block_q)
        return None, attend_block(static.scale, q_i, c_i, keys_of, pairs[i])

    _, (out, lse) = lax.scan(query_block, None, jnp.arange(pairs.shape[0]))
    return _join(out), _join(lse)


def _join(blocks: jax.Array) -> jax.Array:
    """[blocks, B, K, G, q, ...] to [B, K, G, S, ...]."""
    blocks = jnp.moveaxis(blocks, 0, 3)
    return blocks.reshape(*blocks.shape[:3], -1, *blocks.shape[5:])


def attend_block(
    scale: float, q_BKGqd, q_reach: Reach, keys_of: Callable, met: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One block of queries against all keys, with a running maximum and sum (online softmax).

    Args:
        keys_of: keys and values [B, K, t, d] and Coords [B, t] of the block of a given index.
        met: of each block of keys, whether some query may see some of it.
    """

    def step(state, j):
        k_j, v_j, coords = keys_of(j)
        top, total, acc = state
        scores, allowed = _scores(scale, q_BKGqd, k_j, q_reach, coords)
        new_top = jnp.maximum(top, scores.max(-1))
        p = jnp.where(allowed, jnp.exp(scores - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        acc = acc * shrink[..., None] + _dot("BKGqt,BKtd->BKGqd", p.astype(v_j.dtype), v_j)
        return new_top, total * shrink + p.sum(-1), acc

    def visit(state, j):
        return lax.cond(met[j], step, lambda state, _: state, state, j), None

    rows = q_BKGqd.shape[:-1]
    start = (jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros(q_BKGqd.shape, jnp.float32))
    (top, total, acc), _ = lax.scan(visit, start, jnp.arange(met.shape[0]))
    seen = total != 0  # also of NaN
    out = acc / jnp.where(seen, total, 1.0)[..., None]
    lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
    return out.astype(q_BKGqd.dtype), lse


def _flash_forward(static, q, k, v, q_reach, k_coords):
    out, lse = _flash(static, q, k, v, q_reach, k_coords)
    return (out, lse), (q, k, v, q_reach, k_coords, out, lse)


def _flash_backward(static, saved, cotangents):
    """Recomputes each block's probabilities from the log-sum-exp; keys outside, queries inside."""
    q, k, v, q_reach, k_coords, out, lse = saved
    d_out, d_lse = cotangents
    # dS = P * (dP - sum(dO * O) + dLSE); the last two are constant along the keys.
    constant = d_lse - jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)
    constant = _keep(constant, lse != -jnp.inf)
    pairs = _block_pairs(static, q_reach, k_coords)

    def key_block(dq, j):
        k_j, v_j = (_block(x, j, static.block_k, 2) for x in (k, v))
        c_j = _tokens_block(k_coords, j, static.block_k)
        k_j, v_j = (_keep(x, _real(c_j)) for x in (k_j, v_j))

        def step(state, i):
            dq, dk_j, dv_j = state
            lse_i, constant_i = (
                _block(x, i, static.block_q, 3)[..., None] for x in (lse, constant)
            )
            blocks = (_block(x, i, static.block_q, 3) for x in (q, d_out))
            q_i, o_i = (_keep(x, lse_i != -jnp.inf) for x in blocks)
            scores, allowed = _scores(
                static.scale, q_i, k_j, _tokens_block(q_reach, i, static.block_q), c_j
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

IMPLEMENTATION = Implementation("xla", lambda case: None, flash_xla, Config, lambda case: Config())
