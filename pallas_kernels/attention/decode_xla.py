"""Decode attention in plain JAX: reads the cache in blocks and widens quantized ones."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.arrays import pad_axis
from pallas_kernels.attention.block_pairs import chosen, every_block
from pallas_kernels.attention.flash_xla import (
    GPU_BYTES,
    FlashXlaConfig,
    Keys,
    Queries,
    attend_pairs,
    power_of_two,
)
from pallas_kernels.attention.masks import (
    Coords,
    KeyRange,
    extents,
    joined_extents,
    pad_tokens,
    visible_blocks,
)
from pallas_kernels.attention.pages import extents_of_rows, rows_of_pages, without_padding
from pallas_kernels.platform import target
from pallas_kernels.quantized import Quantized, dequantize, unpaired


def config_for(case) -> FlashXlaConfig:
    """A config with blocks of fixed number on GPUs: large, as each is several launches."""
    if target().platform != "gpu":
        return FlashXlaConfig()
    keys = GPU_BYTES // (8 * case.rows * case.kv_heads * case.head_dim)
    return FlashXlaConfig(block_k=power_of_two(keys, most=2**16), data_decides=False)


def decode_xla(q, k, v, q_range: KeyRange, k_coords: Coords, table, case, config: FlashXlaConfig):
    """Output [B, H, S, d] and log-sum-exp [B, H, S], float32."""
    B, H, S, d = q.shape
    q_BKGSd = q.reshape(B, case.kv_heads, H // case.kv_heads, S, d)
    read = _in_rows if table is None else _in_pages
    keys_of, extent = read(k, v, k_coords, table, config.block_k)
    pairs = every_block(extent.first.shape[1])
    if config.data_decides:
        some, _ = visible_blocks(q_range, extent, S)
        pairs = chosen(pairs, jnp.any(some, (0, 1)))

    def widened(j):
        k_j, v_j, coords = keys_of(j)
        return Keys(_widened(k_j, q.dtype), _widened(v_j, q.dtype), coords)

    queries = Queries(q_BKGSd, q_range)
    out, lse = attend_pairs(case.scale, q_BKGSd, lambda i: queries, widened, pairs, part=True)
    return out.reshape(q.shape), lse.reshape(B, H, S)


def _in_rows(k, v, k_coords: Coords, table, block: int):
    """A function of the index of a block of keys, and what there is in each block."""
    block = min(block, k.shape[2])
    coords = pad_tokens(k_coords, block)
    k, v = (jax.tree.map(lambda leaf: pad_axis(leaf, 2, block), unpaired(x)) for x in (k, v))

    def cut(x, j, axis: int):
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, j * block, block, axis), x)

    def keys_of(j):
        there = cut(coords, j, 1)
        return cut(k, j, 2), without_padding(cut(v, j, 2), there), there

    return keys_of, extents(coords, block)


def _in_pages(k, v, k_coords: Coords, table, block: int):
    """A function of the index of a block of pages, and what there is in each block.

    A block is as many of a row's pages as have `block` keys.
    """
    at_once = max(1, min(table.shape[1], block // k.shape[2]))
    pages = pad_axis(table, 1, at_once)
    real = jnp.arange(pages.shape[1]) < table.shape[1]
    extent = extents_of_rows(extents(k_coords, k.shape[2]), pages, real)

    def keys_of(j):
        taken = lax.dynamic_slice_in_dim(pages, j * at_once, at_once, 1)
        counts = lax.dynamic_slice_in_dim(real, j * at_once, at_once)
        return rows_of_pages(k, v, k_coords, taken, counts)

    return keys_of, joined_extents(extent, at_once)


def _widened(x, dtype):
    return dequantize(x, jnp.float32) if isinstance(x, Quantized) else x.astype(dtype)
