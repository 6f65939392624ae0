"""Decode attention in plain JAX: reads the cache in blocks and widens quantized ones."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.arrays import pad_axis
from pallas_kernels.attention.flash_xla import Config, attend_block
from pallas_kernels.attention.masks import Coords, meets, pad_tokens, reach
from pallas_kernels.quantized import Quantized, dequantize


def decode_xla(q, k, v, q_coords: Coords, k_coords: Coords, table, case, config: Config):
    """Output [B, H, S, d] and log-sum-exp [B, H, S]."""
    B, H, S, d = q.shape
    q_BKGSd = q.reshape(B, case.kv_heads, H // case.kv_heads, S, d)
    q_reach = reach(q_coords, causal=case.causal, chunk=case.chunk)
    block = case.page or min(config.block_k, case.keys)
    k_coords = pad_tokens(k_coords, block)
    some, _ = meets(q_reach, k_coords, S, block)

    if table is None:
        k, v = (jax.tree.map(lambda leaf: pad_axis(leaf, 2, block), x) for x in (k, v))

    def keys_of(j):
        return tuple(_widened(_block(x, table, j, block), q.dtype) for x in (k, v))

    out, lse = attend_block(case.scale, q_BKGSd, q_reach, keys_of, k_coords, jnp.any(some, (0, 1)))
    return out.reshape(q.shape), lse.reshape(B, H, S)


def _block(x, table, j, block: int):
    """Keys [B, K, block, ...] of block j of every row."""
    if table is not None:
        return jax.tree.map(lambda leaf: leaf[table[:, j]], x)
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, j * block, block, 2), x)


def _widened(x, dtype):
    return dequantize(x, jnp.float32) if isinstance(x, Quantized) else x.astype(dtype)
