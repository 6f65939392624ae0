"""Applies RoPE, QK norm and temperature to new tokens, and writes keys and values to a paged cache.

Shape letters: T tokens, S partial sums of a product, H query heads, K key/value heads, d head size,
P pages, t tokens of a page; m the 64 rows of a tile, one for each token.
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
    ROWS,
    WARPGROUP,
    WGMMA,
    Wgmma,
    along_rows,
    hopper_kernel,
    tile,
)
from pallas_kernels.quantized import LARGEST, Quantized, unpaired
from pallas_kernels.step.matmul import UNIT, tokens_tile
from pallas_kernels.step.tpu_heads import write_heads_tpu
from pallas_kernels.tpu import why_not_tpu

ROW_UNIT = 128  # bytes: the alignment in shared memory that TMA requires
Keys = Float[Array, "P K t d"] | Quantized


class HeadPlan(NamedTuple):
    """Data of the new tokens that all layers of a kind share.

    Attributes:
        cos: cosine of the rotary angle for each element of a head, whose pairs are (0, 1), (2, 3)
            and so on; padded to 64 tokens. None for layers without RoPE.
        sin: sine of the same angles.
        temperature: multiplies the queries; padded to 64 tokens. None for no temperature.
        slot: each token's slot in the pool of pages, page * t + offset; P * t or more for a token
            that is not written.
    """

    cos: Float[Array, "64 d"] | None
    sin: Float[Array, "64 d"] | None
    temperature: Float[Array, "64"] | None
    slot: Int[Array, "T"]


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
    """Returns queries ready for attention, and the cache with the new tokens' keys and values.

    Rounds to `dtype` after the product, after RoPE and after the norm.

    Args:
        qkv: from `matmul_few`, the heads of queries, then of keys, then of values.
        plan: data of the new tokens.
        k: pages of keys, updated in place if donated.
        v: pages of values, updated in place if donated.
        heads: H.
        norm_eps: the epsilon of the RMS norm of rotated queries and keys; None for no norm.
        dtype: of the queries.
        interpret: parameters of an interpreter, or None.
    """
    if why_not_tpu(interpret) is None:
        sizes = {"heads": heads, "norm_eps": norm_eps, "dtype": dtype}
        return write_heads_tpu(qkv, plan, k, v, **sizes, interpret=interpret)
    T, (_, K, _, _), d = plan.slot.shape[0], k.shape, k.shape[3]
    caches = [jax.tree.map(jax.new_ref, unpaired(x)) for x in (k, v)]
    rows = T if T < UNIT else -(-T // UNIT) * UNIT
    format = k.format if isinstance(k, Quantized) else None
    wide = WARPGROUP, d
    kernel = hopper_kernel(
        functools.partial(_kernel, Wgmma(interpret is not None), heads, K, norm_eps, format),
        out_type=jax.ShapeDtypeStruct((rows, heads, d), dtype),
        scratch_types=(
            plgpu.SMEM((qkv.shape[0], *wide), jnp.float32),
            tile(*wide),
            tile(d, d),
            _rows_tile(jax.tree.leaves(unpaired(k))[0]),
            plgpu.SMEM((WARPGROUP,), jnp.float32),
            plgpu.Barrier(num_arrivals=qkv.shape[0] + (plan.cos is not None)),
        ),
        grid=(heads + 2 * K,),
        grid_names=("head",),
        interpret=interpret,
        kernel_name="write_heads",
    )
    q = kernel(qkv, swap_pairs(d), plan, *(jax.tree.leaves(cache) for cache in caches))
    k, v = (  # in the shapes that they had
        jax.tree.map(lambda old, ref: ref[...].reshape(old.shape), *each)
        for each in zip((k, v), caches, strict=True)
    )
    return q if rows == T else q[:T], k, v


def swap_pairs(d: int) -> jax.Array:
    """The matrix [d, d] that maps pairs (even, odd) to (-odd, even), exactly, in bfloat16."""
    swap = np.zeros((d, d), np.float32)
    even = np.arange(0, d, 2)
    swap[even + 1, even], swap[even, even + 1] = -1, 1
    return jnp.asarray(swap, jnp.bfloat16)


def _rows_tile(stored):
    """The type of a shared-memory tile of 64 tokens' stored keys, whose rows TMA can copy singly.

    TMA copies from addresses that are multiples of 128 bytes, so narrower rows are padded.
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
        q = _rotate_and_norm(mma, norm_eps, plan, x, x_md, swap)
        if plan.temperature is not None:
            q = q * along_rows(plgpu.load(plan.temperature, layout=ROWS, optimized=False), q)
        x_md[...] = q.astype(x_md.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_md, q_THd.at[tokens, h])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when((h >= heads) & (h < heads + kv_heads))
    def _keys():
        k = _rotate_and_norm(mma, norm_eps, plan, x, x_md, swap)
        _write(k, format, k_refs, h - heads, plan.slot, stored_md, scale_m)

    @pl.when(h >= heads + kv_heads)
    def _values():
        _write(x, format, v_refs, h - heads - kv_heads, plan.slot, stored_md, scale_m)


def load(ref) -> jax.Array:
    """Loads a tile into registers in the layout of an accumulator."""
    return plgpu.load(ref, layout=WGMMA, optimized=False)


def _rotate_and_norm(mma, norm_eps, plan, x, x_md, swap) -> jax.Array:
    """Applies RoPE and the norm to x, rounding after each; returns x on layers without RoPE."""
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


def _write(x, format, refs, head, slot_T, stored_md, scale_m) -> None:
    """Writes each token's keys or values to its slot of the cache, quantized if it has a format."""
    if format is not None:
        x, scale_m[...] = _quantized(x, format)
    width = pl.ds(0, x.shape[1])
    stored_md.at[:, width][...] = x.astype(stored_md.dtype)
    plgpu.commit_smem()
    stored_ref, *scale_ref = refs
    pages, _, page_size, _ = stored_ref.shape

    @pl.loop(0, slot_T.shape[0])
    def _(token):
        page = lax.div(slot_T[token], page_size)
        offset = lax.rem(slot_T[token], page_size)

        @pl.when(page < pages)
        def _():
            to = stored_ref.at[page, head, pl.ds(offset, 1)]
            plgpu.copy_smem_to_gmem(stored_md.at[pl.ds(token, 1), width], to)
            for ref in scale_ref:
                ref[page, head, offset] = scale_m[token]

    plgpu.wait_smem_to_gmem(0)


def _quantized(x, format: str) -> tuple[jax.Array, jax.Array]:
    """Quantizes each row as `pallas_kernels.quantized.quantize` does: stored values and scales."""
    scale = jnp.abs(x).max(axis=1) / LARGEST[format]
    x = x / along_rows(jnp.where(scale == 0, 1.0, scale), x)
    if format == "fp8":
        return x, scale
    x = jnp.round(x)
    if format == "int4":
        low, high = (x[:, i : i + x.shape[1] // 2].astype(jnp.int32) for i in (0, x.shape[1] // 2))
        return (low & 15) | (high << 4), scale
    return x, scale
