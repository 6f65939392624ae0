"""New tokens' queries rotated, normalized and scaled; their keys and values written to their pages.

Shape letters: T tokens, S parts that a product is the sum of, H query heads, K key/value heads, d
head size, P pages, t tokens of a page; m the 64 rows of a tile, one a token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic import (
    COMPILER_PARAMS,
    ROWS,
    WARPGROUP,
    WGMMA,
    Wgmma,
    along_rows,
    tile,
)
from pallas_kernels.quantized import LARGEST, Quantized
from pallas_kernels.step.matmul import UNIT, tokens_tile

ROW_UNIT = 128  # bytes
Keys = Float[Array, "P K t d"] | Quantized


class HeadPlan(NamedTuple):
    """What the heads of all layers of a kind need to know of the new tokens.

    Attributes:
        cos, sin: of each token's rotation, one value an element of a head, for pairs (0, 1), (2, 3)
            and so on; padded to 64 tokens. None where nothing is rotated.
        temperature: what multiplies queries, padded to 64 tokens; None for nothing.
        place: in the pool of pages, counted in tokens; beyond it for a token that goes nowhere.
    """

    cos: Float[Array, "64 d"] | None
    sin: Float[Array, "64 d"] | None
    temperature: Float[Array, "64"] | None
    place: Int[Array, "T"]


def write_heads(
    qkv: Float[Array, "S T_padded all_heads"],
    plan: HeadPlan,
    k: Keys,
    v: Keys,
    *,
    heads: int,
    norm_eps: float | None,
    dtype=jnp.bfloat16,
    interpret=None,
) -> tuple[Float[Array, "T H d"], Keys, Keys]:
    """Queries ready for attention, and the cache with the new tokens' keys and values.

    Rounds to `dtype` after the product, after the rotation and after the norm.

    Args:
        qkv: from `matmul_few`, heads of queries, keys and values beside one another.
        k, v: the cache; it is updated in place where it is donated.
        heads: H.
        norm_eps: normalizes rotated queries and keys to a mean square of 1; None: not.
    """
    T, (_, K, _, _), d = plan.place.shape[0], k.shape, k.shape[3]
    caches = [jax.tree.map(jax.new_ref, x) for x in (k, v)]
    rows = T if T < UNIT else -(-T // UNIT) * UNIT
    format = k.format if isinstance(k, Quantized) else None
    wide = WARPGROUP, d
    kernel = plgpu.kernel(
        functools.partial(_kernel, Wgmma(interpret is not None), heads, K, norm_eps, format),
        out_type=jax.ShapeDtypeStruct((rows, heads, d), dtype),
        scratch_types=(
            plgpu.SMEM((qkv.shape[0], *wide), jnp.float32),
            tile(*wide),
            tile(d, d),
            _rows_tile(jax.tree.leaves(k)[0]),
            plgpu.SMEM((WARPGROUP,), jnp.float32),
            plgpu.Barrier(num_arrivals=qkv.shape[0] + (plan.cos is not None)),
        ),
        grid=(heads + 2 * K,),
        grid_names=("head",),
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
        kernel_name="write_heads",
    )
    q = kernel(qkv, swap_pairs(d), plan, *(jax.tree.leaves(cache) for cache in caches))
    return (q if rows == T else q[:T], *(jax.tree.map(lambda x: x[...], x) for x in caches))


def swap_pairs(d: int) -> jax.Array:
    """A matrix that turns pairs (even, odd) into (-odd, even), exactly: entries are 0, 1, -1."""
    swap = np.zeros((d, d), np.float32)
    even = np.arange(0, d, 2)
    swap[even + 1, even], swap[even, even + 1] = -1, 1
    return jnp.asarray(swap, jnp.bfloat16)


def _rows_tile(stored):
    """Shared memory of 64 tokens' keys as stored, of which each can be copied alone.

    TMA copies from multiples of 128 bytes: narrower rows are followed by room.
    """
    width, size = stored.shape[3], jnp.dtype(stored.dtype).itemsize
    swizzle = min(ROW_UNIT, width * size)
    transforms = (plgpu.TilingTransform((1, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    shape = WARPGROUP, max(width, ROW_UNIT // size)
    return plgpu.SMEM(shape, stored.dtype, transforms=transforms)


def _kernel(
    mma, heads, kv_heads, norm_eps, format, qkv_STF, swap_dd, plan, k_refs, v_refs, q_THd,
    parts_Smd, x_md, swap, stored_md, scale_m, filled,
):  # fmt: skip
    h, tokens = lax.axis_index("head"), tokens_tile("head")
    d = x_md.shape[1]
    for part in range(qkv_STF.shape[0]):
        source = qkv_STF.at[part, tokens, pl.ds(h * d, d)]
        plgpu.copy_gmem_to_smem(source, parts_Smd.at[part], filled)
    if plan.cos is not None:
        plgpu.copy_gmem_to_smem(swap_dd, swap, filled)
    plgpu.barrier_wait(filled)
    parts = (load(parts_Smd.at[part]) for part in range(qkv_STF.shape[0]))
    x = functools.reduce(jnp.add, parts).astype(x_md.dtype).astype(jnp.float32)

    @pl.when(h < heads)
    def _queries():
        q = _turned(mma, norm_eps, plan, x, x_md, swap)
        if plan.temperature is not None:
            q = q * along_rows(plgpu.load(plan.temperature, layout=ROWS, optimized=False), q)
        x_md[...] = q.astype(x_md.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_md, q_THd.at[tokens, h])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when((h >= heads) & (h < heads + kv_heads))
    def _keys():
        k = _turned(mma, norm_eps, plan, x, x_md, swap)
        _write(k, format, k_refs, h - heads, plan.place, stored_md, scale_m)

    @pl.when(h >= heads + kv_heads)
    def _values():
        _write(x, format, v_refs, h - heads - kv_heads, plan.place, stored_md, scale_m)


def load(ref) -> jax.Array:
    """A tile as a warpgroup holds an accumulator."""
    return plgpu.load(ref, layout=WGMMA, optimized=False)


def _turned(mma, norm_eps, plan, x, x_md, swap) -> jax.Array:
    """Rotated and normalized, each rounded; x itself on layers without rotation."""
    if plan.cos is None:
        return x
    x_md[...] = x.astype(x_md.dtype)
    plgpu.commit_smem()
    swapped = mma.dot(x_md, swap)
    x = x * load(plan.cos) + swapped * load(plan.sin)
    x = x.astype(x_md.dtype).astype(jnp.float32)
    if norm_eps is None:
        return x
    square = (x * x).sum(axis=1) / x.shape[1]
    x = x * along_rows(lax.rsqrt(square + norm_eps), x)
    return x.astype(x_md.dtype).astype(jnp.float32)


def _write(x, format, refs, head, place_T, stored_md, scale_m) -> None:
    """Each token's keys or values to its place, with their scale if they have one."""
    if format is not None:
        x, scale_m[...] = _quantized(x, format)
    width = pl.ds(0, x.shape[1])
    stored_md.at[:, width][...] = x.astype(stored_md.dtype)
    plgpu.commit_smem()
    stored_ref, *scale_ref = refs
    pages, _, page_size, _ = stored_ref.shape

    @pl.loop(0, place_T.shape[0])
    def _(token):
        page = lax.div(place_T[token], page_size)
        slot = lax.rem(place_T[token], page_size)

        @pl.when(page < pages)
        def _():
            to = stored_ref.at[page, head, pl.ds(slot, 1)]
            plgpu.copy_smem_to_gmem(stored_md.at[pl.ds(token, 1), width], to)
            for ref in scale_ref:
                ref[page, head, slot] = scale_m[token]

    plgpu.wait_smem_to_gmem(0)


def _quantized(x, format: str) -> tuple[jax.Array, jax.Array]:
    """As `quantize`: what is stored of each row, and its scale."""
    scale = jnp.abs(x).max(axis=1) / LARGEST[format]
    x = x / along_rows(jnp.where(scale == 0, 1.0, scale), x)
    if format == "fp8":
        return x, scale
    x = jnp.round(x)
    if format == "int4":
        low, high = (x[:, i : i + x.shape[1] // 2].astype(jnp.int32) for i in (0, x.shape[1] // 2))
        return (low & 15) | (high << 4), scale
    return x, scale
