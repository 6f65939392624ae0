"""Flash attention in plain JAX: the reference, and the path of CPUs and of other GPUs.

No score matrix of length x length: one loop goes over pairs of a block of queries and a block of
keys. Where data may decide how long a loop is, it leaves out pairs of which no query sees a key, so
causal, chunked and packed attention cost what they should. The host of a GPU would have to wait for
that data at every step: there the call's promises decide which pairs are visited.

Shape letters: B rows, H query heads, K key/value heads, G = H / K, S queries, T keys, d head size;
q and t are the sizes of one block of queries and of keys.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.arrays import pad_axis
from pallas_kernels.attention.block_pairs import (
    Pairs,
    Rule,
    chosen,
    every_block,
    over_pairs,
    visible_pairs,
)
from pallas_kernels.attention.masks import Coords, KeyRange, pad_tokens, visible
from pallas_kernels.attention.residuals import named
from pallas_kernels.choice import Implementation
from pallas_kernels.platform import target

HIGHEST = lax.Precision.HIGHEST
MASKED = -1e30  # finite, so that exp(score - running_max) never meets inf - inf
LN2 = math.log(2)
GPU_BLOCK = 1024
CPU_BYTES = 2**29  # of scores that a CPU computes at once where nothing is masked: 20 tiles
GPU_BYTES = 2**27  # of what one step of a loop on a GPU writes: scores, or widened keys and values


@dataclasses.dataclass(frozen=True)
class FlashXlaConfig:
    """Tile sizes and the kind of loop; results do not depend on them beyond rounding.

    Attributes:
        data_decides: whether data says, while the loop runs, which blocks it visits.
    """

    block_q: int = 256
    block_k: int = 512
    data_decides: bool = True


def config_for(case) -> FlashXlaConfig:
    """Large blocks and loops of fixed length on GPUs, and where every query sees every key."""
    if _sees_all(case):
        return _whole(case)
    if target().platform != "gpu":
        return FlashXlaConfig()
    rows = GPU_BYTES // (4 * case.rows * case.heads * GPU_BLOCK)
    return FlashXlaConfig(power_of_two(rows, most=GPU_BLOCK), GPU_BLOCK, data_decides=False)


def _sees_all(case) -> bool:
    """Whether every query sees every key."""
    return case.plain and not case.mask.causal and case.mask.span is None


def _whole(case) -> FlashXlaConfig:
    """Few blocks of equal size: nothing can be left out, and a pair alone needs no loop."""
    block_k = even_part(case.keys, most=GPU_BLOCK)
    rows = GPU_BYTES // (4 * case.rows * case.heads * block_k)
    return FlashXlaConfig(even_part(case.queries, max(64, rows)), block_k, data_decides=False)


def even_part(length: int, most: int) -> int:
    """The size of the fewest equal parts of a length that have at most so many."""
    return -(-length // -(-length // most))


def power_of_two(size: int, most: int) -> int:
    """The largest power of two up to `size`, but from 64 to `most`."""
    return max(64, min(most, 2 ** max(0, size.bit_length() - 1)))


@dataclasses.dataclass(frozen=True)
class _XlaCall:
    scale: float
    rule: Rule
    dtype: str  # of the output
    part: bool  # whether the output is joined with that of further keys


def flash_xla(q, k, v, q_range: KeyRange, k_coords: Coords, case, config: FlashXlaConfig):
    """Output [B, H, S, d] and log-sum-exp [B, H, S], both differentiable."""
    B, H, S, d = q.shape
    K = k.shape[1]
    in_cache = 4 * B * H * S * k.shape[2] <= CPU_BYTES and target().platform == "cpu"
    if _sees_all(case) and in_cache:
        out, lse = _unmasked(case.scale, q.reshape(B, K, -1, d), k, v)
        dtype = jnp.float32 if case.return_lse else q.dtype
        return out.reshape(q.shape).astype(dtype), lse.reshape(B, H, S)
    block_q, block_k = min(config.block_q, S), min(config.block_k, k.shape[2])
    rule = Rule.of(case, block_q, block_k, config.data_decides)
    dtype = "float32" if case.return_lse else case.dtype
    static = _XlaCall(case.scale, rule, dtype, case.return_lse)
    q_range, k_coords = pad_tokens(q_range, block_q), pad_tokens(k_coords, block_k)
    q_BKGSd = pad_axis(q, 2, block_q).reshape(B, K, H // K, -1, d)
    k, v = (pad_axis(x, 2, block_k) for x in (k, v))
    out, lse = _flash(static, q_BKGSd, k, v, q_range, k_coords)
    return out.reshape(B, H, -1, d)[:, :, :S], lse.reshape(B, H, -1)[:, :, :S]


def _unmasked(scale: float, q, k, v) -> tuple[jax.Array, jax.Array]:
    """Output [B, K, G * S, d] and log-sum-exp in float32 of queries that see all keys, at once."""
    scores = _dot("BKnd,BKtd->BKnt", q, k) * scale
    top = lax.stop_gradient(scores.max(-1))
    p = jnp.exp(scores - top[..., None])
    total = p.sum(-1)
    return _dot("BKnt,BKtd->BKnd", p.astype(v.dtype), v) / total[..., None], top + jnp.log(total)


def _block(x: jax.Array, index: jax.Array, size: int, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _tokens_block(tokens, index: jax.Array, size: int):
    return jax.tree.map(lambda x: _block(x, index, size, 1), tokens)


def _put(x: jax.Array, block: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    start = index * block.shape[axis]
    return lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), start, axis)


def _add(x: jax.Array, block: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    return _put(x, _block(x, index, block.shape[axis], axis) + block, index, axis)


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, precision=HIGHEST, preferred_element_type=jnp.float32)


class Queries(NamedTuple):
    """A block of queries, and the range of keys that each sees."""

    q: jax.Array  # [B, K, G, q, d]
    range: KeyRange


class Keys(NamedTuple):
    """A block of keys and values with their coordinates."""

    k: jax.Array  # [B, K, t, d]
    v: jax.Array
    coords: Coords


def _scores(scale: float, queries: Queries, keys: Keys):
    """Scaled scores [B, K, G, q, t], MASKED where a query sees no key, and where it sees one."""
    allowed = visible(queries.range, keys.coords)[:, None, None]
    scores = _dot("BKGqd,BKtd->BKGqt", queries.q, keys.k) * scale
    return jnp.where(allowed, scores, MASKED), allowed


def _seen(allowed: jax.Array, x_BKtd: jax.Array) -> jax.Array:
    """x with zeros for keys that no query sees: their NaN would survive a product with 0."""
    return jnp.where(allowed.any((2, 3))[..., None], x_BKtd, 0)


def _seeing(allowed: jax.Array, x_BKGqd: jax.Array) -> jax.Array:
    """x with zeros for queries that see no key."""
    return jnp.where(allowed.any(4)[..., None], x_BKGqd, 0)


def _cut(static: _XlaCall, q, k, v, q_range: KeyRange, k_coords: Coords):
    """Functions of an index that give a block of queries, and one of keys."""
    block_q, block_k = static.rule.block_q, static.rule.block_k

    def queries_of(i):
        return Queries(_block(q, i, block_q, 3), _tokens_block(q_range, i, block_q))

    def keys_of(j):
        k_j, v_j = (_block(x, j, block_k, 2) for x in (k, v))
        return Keys(k_j, v_j, _tokens_block(k_coords, j, block_k))

    return queries_of, keys_of


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(static: _XlaCall, q, k, v, q_range: KeyRange, k_coords: Coords):
    queries_of, keys_of = _cut(static, q, k, v, q_range, k_coords)
    if not static.rule.data_decides:
        attend = functools.partial(
            attend_pairs, static.scale, q, queries_of, keys_of, part=static.part
        )
        out, lse = over_pairs(static.rule, q_range, k_coords, attend)
        return out.astype(static.dtype), lse

    def attend_block(_, block):
        i, seen = block
        queries, pairs = queries_of(i), chosen(every_block(len(seen)), seen)
        out, lse = attend_pairs(
            static.scale, queries.q, lambda _: queries, keys_of, pairs, part=static.part
        )
        return None, (out.astype(static.dtype), lse)

    seen = visible_pairs(static.rule, q_range, k_coords)
    _, (out, lse) = lax.scan(attend_block, None, (jnp.arange(len(seen)), seen))
    return _join(out), _join(lse)


def _join(blocks: jax.Array) -> jax.Array:
    """[blocks, B, K, G, q, ...] to [B, K, G, S, ...]."""
    blocks = jnp.moveaxis(blocks, 0, 3)
    return blocks.reshape(*blocks.shape[:3], -1, *blocks.shape[5:])


def attend_pairs(
    scale: float, q_BKGSd, queries_of: Callable, keys_of: Callable, pairs: Pairs, *, part: bool
) -> tuple[jax.Array, jax.Array]:
    """Output [B, K, G, S, d] and log-sum-exp, by a running maximum and sum (online softmax).

    Both are float32.

    Args:
        queries_of: a block of queries and what they see, by its index.
        keys_of: a block of keys, by its index.
        part: whether the output is joined with that of further keys, by the log-sum-exp. Then it is
            divided by the sum of the exact probabilities, as the joined one is; else by the sum of
            what they were rounded to, so that a query that sees one key gives its value.
    """

    def visit(n, state):
        i, j = pairs.q[n], pairs.k[n]
        queries = queries_of(i)
        size = queries.q.shape[3]
        old = [_block(x, i, size, 3) for x in state]
        new = _online_softmax(scale, old, queries, keys_of(j))
        return [_put(x, x_i, i, 3) for x, x_i in zip(state, new, strict=True)]

    rows = q_BKGSd.shape[:-1]
    zeros = jnp.zeros(rows)
    state = [jnp.full(rows, MASKED), zeros, zeros, jnp.zeros(q_BKGSd.shape, jnp.float32)]
    top, total, rounded, acc = lax.fori_loop(0, pairs.count, visit, state)
    seen = total > 0
    total, rounded = (jnp.where(seen, x, 1.0) for x in (total, rounded))
    lse = jnp.where(seen, top + jnp.log(total), -jnp.inf)
    return acc / (total if part else rounded)[..., None], lse


def _online_softmax(scale: float, state, queries: Queries, keys: Keys) -> list[jax.Array]:
    top, total, rounded, acc = state
    scores, allowed = _scores(scale, queries, keys)
    new_top = jnp.maximum(top, power_of_two_above(scores.max(-1)))
    p = jnp.where(allowed, jnp.exp(scores - new_top[..., None]), 0.0)
    shrink = jnp.exp(top - new_top)
    v = _seen(allowed, keys.v)
    kept = jnp.finfo(v.dtype)
    weights = lax.reduce_precision(p, kept.nexp, kept.nmant)  # XLA may leave out casts, not this
    acc = acc * shrink[..., None] + _dot("BKGqt,BKtd->BKGqd", weights.astype(v.dtype), v)
    rounded = rounded * shrink + weights.sum(-1)
    return [new_top, total * shrink + p.sum(-1), rounded, acc]


def power_of_two_above(top: jax.Array) -> jax.Array:
    """The least natural logarithm of a power of two that is no less.

    Probabilities below different such maxima differ by a power of two, so that their roundings to
    bfloat16 do not depend on which keys share a block.
    """
    return jnp.ceil(top / LN2) * LN2


def _flash_forward(static, q, k, v, q_range, k_coords):
    out, lse = named(*_flash(static, q, k, v, q_range, k_coords))
    return (out, lse), (q, k, v, q_range, k_coords, out, lse)


def _flash_backward(static, saved, cotangents):
    """Recomputes the probabilities of each pair of blocks from the log-sum-exp."""
    q, k, v, q_range, k_coords, out, lse = saved
    d_out, d_lse = cotangents
    # dS = P * (dP - sum(dO * O) + dLSE); the last two are constant along the keys.
    constant = d_lse - jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)
    queries_of, keys_of = _cut(static, q, k, v, q_range, k_coords)
    block_q = static.rule.block_q

    def visit(pairs, n, gradients):
        dq, dk, dv = gradients
        i, j = pairs.q[n], pairs.k[n]
        of_queries = [_block(x, i, block_q, 3) for x in (d_out, lse, constant)]
        dq_i, dk_j, dv_j = _gradients(static.scale, queries_of(i), keys_of(j), *of_queries)
        return _add(dq, dq_i, i, 3), _add(dk, dk_j, j, 2), _add(dv, dv_j, j, 2)

    def differentiate(pairs):
        zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
        sums = lax.fori_loop(0, pairs.count, functools.partial(visit, pairs), tuple(zeros))
        return [x.astype(like.dtype) for x, like in zip(sums, (q, k, v), strict=True)]

    return *over_pairs(static.rule, q_range, k_coords, differentiate), None, None


def _gradients(scale: float, queries: Queries, keys: Keys, d_out, lse, constant):
    """What one pair of blocks adds to dq, dk and dv."""
    scores, allowed = _scores(scale, queries, keys)
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)
    p = jnp.where(allowed, jnp.exp(scores - lse[..., None]), 0.0)
    d_out, q = _seeing(allowed, d_out), _seeing(allowed, queries.q)
    k, v = (_seen(allowed, x) for x in (keys.k, keys.v))
    dp = _dot("BKGqd,BKtd->BKGqt", d_out, v) + constant[..., None]
    ds = jnp.where(allowed, p * dp * scale, 0.0).astype(q.dtype)
    return (
        _dot("BKGqt,BKtd->BKGqd", ds, k),
        _dot("BKGqt,BKGqd->BKtd", ds, q),
        _dot("BKGqt,BKGqd->BKtd", p.astype(q.dtype), d_out),
    )


_flash.defvjp(_flash_forward, _flash_backward)

IMPLEMENTATION = Implementation("xla", lambda case: None, flash_xla, FlashXlaConfig, config_for)
