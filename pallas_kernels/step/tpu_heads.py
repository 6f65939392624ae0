"""Applies RoPE, QK norm and temperature to new tokens on TPUs, and writes them to a paged cache.

A token's keys are one row of a tile in which rows share 32-bit words, so the rows around it are
copied to the chip, changed and copied back. No two tokens of a step write to one page.

Shape letters: T tokens, S partial sums of a product, H query heads, K key/value heads, d head size,
P pages, t tokens of a page, u rows of a tile.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.quantized import LARGEST, Quantized
from pallas_kernels.tpu import IN_HBM, VMEM_BYTES, in_hbm

ROWS = 32  # u: a multiple of the rows of every dtype's tile


def write_heads_tpu(
    qkv: Float[Array, "S T_padded all_heads"],
    plan,
    k,
    v,
    *,
    heads: int,
    norm_eps: float | None,
    dtype=jnp.bfloat16,
    interpret=None,
):
    """As `write_heads`."""
    T, (_, K, t, d) = plan.slot.shape[0], k.shape
    caches = [*jax.tree.leaves(k), *jax.tree.leaves(v)]
    angles = [] if plan.cos is None else [plan.cos, plan.sin]
    scalars = [plan.slot] if plan.temperature is None else [plan.slot, plan.temperature]
    vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
    format = k.format if isinstance(k, Quantized) else None
    kernel = pl.pallas_call(
        functools.partial(_kernel, len(scalars), len(angles), heads, K, t, norm_eps, format, dtype),
        out_shape=[
            jax.ShapeDtypeStruct((T, heads, d), dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches),
        ],
        in_specs=[
            *[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(scalars),
            *[vmem] * (1 + len(angles)),
            *[IN_HBM] * len(caches),
        ],
        out_specs=[vmem, *[IN_HBM] * len(caches)],
        scratch_shapes=[
            [_window(x, T) for x in caches],
            pltpu.SemaphoreType.DMA((2,)),
        ],
        input_output_aliases={
            len(scalars) + 1 + len(angles) + i: 1 + i for i in range(len(caches))
        },
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret or False,
        name="write_heads",
    )  # fmt: skip
    q, *caches = kernel(*scalars, qkv, *angles, *in_hbm(caches))
    structure = jax.tree.structure((k, v))
    return (q, *jax.tree.unflatten(structure, caches))


def _window(cache, tokens: int):
    """Scratch for the part of each token's page that is changed: of scales all, else some rows."""
    _, K, t, *rest = cache.shape
    return pltpu.VMEM((tokens, K, min(t, ROWS) if rest else t, *rest), cache.dtype)


def _kernel(scalars: int, angles: int, heads, K, t, norm_eps, format, dtype, *refs):
    slot_ref, *temperature = refs[:scalars]
    qkv_ref, *angle_refs = refs[scalars : scalars + 1 + angles]
    *refs, windows, copied = refs[scalars + 1 + angles :]
    q_ref, caches = refs[len(windows)], refs[len(windows) + 1 :]
    T, _, d = q_ref.shape
    qkv = functools.reduce(jnp.add, (qkv_ref[part, :T] for part in range(qkv_ref.shape[0])))
    qkv = _rounded(qkv, dtype)
    turns = [ref[:T] for ref in angle_refs]

    move = functools.partial(_move, slot_ref, t, caches, windows)
    move(lambda hbm, vmem: pltpu.make_async_copy(hbm, vmem, copied.at[0]).start())

    def head(index: int) -> jax.Array:
        x = qkv[:, index * d : (index + 1) * d]
        return _turned(x, turns, norm_eps, dtype) if index < heads + K else x

    for index in range(heads):
        q = head(index)
        if temperature:
            q = jnp.concatenate([q[i : i + 1] * temperature[0][i] for i in range(T)])
        q_ref[:, index] = q.astype(dtype)
    new = [
        leaf
        for begin in (heads, heads + K)
        for leaf in zip(*(_stored(head(begin + i), format) for i in range(K)), strict=True)
    ]
    move(lambda hbm, vmem: pltpu.make_async_copy(hbm, vmem, copied.at[0]).wait())
    for token in range(T):
        for window, values in zip(windows, new, strict=True):
            _change(window.at[token], [x[token : token + 1] for x in values], slot_ref[token] % t)
    move(lambda hbm, vmem: pltpu.make_async_copy(vmem, hbm, copied.at[1]).start())
    move(lambda hbm, vmem: pltpu.make_async_copy(vmem, hbm, copied.at[1]).wait())


def _rounded(x, dtype) -> jax.Array:
    return x.astype(dtype).astype(jnp.float32)


def _turned(x, turns: Sequence[jax.Array], norm_eps, dtype) -> jax.Array:
    """RoPE and the norm of one head [T, d], rounding after each; x on layers without RoPE."""
    if not turns:
        return x
    cos, sin = turns
    d = x.shape[1]
    even = lax.broadcasted_iota(jnp.int32, x.shape, 1) % 2 == 0
    swapped = jnp.where(even, -pltpu.roll(x, d - 1, 1), pltpu.roll(x, 1, 1))
    x = _rounded(x * cos + swapped * sin, dtype)
    if norm_eps is None:
        return x
    mean = jnp.sum(x * x, axis=1, keepdims=True) / d
    return _rounded(x * lax.rsqrt(mean + norm_eps), dtype)


def _stored(x: jax.Array, format: str | None) -> tuple[jax.Array, ...]:
    """Keys or values [T, d] as the cache stores them, with scales [T, 1] if it has a format."""
    if format is None:
        return (x,)
    scale = jnp.max(jnp.abs(x), axis=1, keepdims=True) / LARGEST[format]
    x = x / jnp.where(scale == 0, 1.0, scale)
    if format == "fp8":
        return x, scale
    x = jnp.round(x)
    if format == "int4":
        low, high = (x[:, i : i + x.shape[1] // 2].astype(jnp.int32) for i in (0, x.shape[1] // 2))
        x = ((low & 15) | (high << 4)).astype(jnp.float32)
    return x, scale


def _move(slot_ref, t: int, caches, windows, act: Callable) -> None:
    """Does `act` with each token's part of each cache and with its window."""

    @pl.loop(0, slot_ref.shape[0])
    def _(token):
        page, offset = slot_ref[token] // t, slot_ref[token] % t
        pages = caches[0].shape[0]

        @pl.when(page < pages)
        def _():
            for cache, window in zip(caches, windows, strict=True):
                whole = cache.at[page]
                if len(cache.shape) == 4:
                    rows = window.shape[2]
                    row = offset // (t // cache.shape[2])
                    whole = whole.at[:, pl.ds(row // rows * rows, rows)]
                act(whole, window.at[token])


def _change(window, values: Sequence[jax.Array], offset) -> None:
    """Puts a token's keys, values or scales into its window.

    Args:
        window: [K, u, row] or of scales [K, t].
        values: of each head [1, d] or [1, 1]; of keys in pairs half a row.
        offset: the token's place in its page.
    """
    if len(window.shape) == 2:
        mine = lax.broadcasted_iota(jnp.int32, (1, window.shape[1]), 1) == offset
    else:
        _, rows, row = window.shape
        together, shape = row // values[0].shape[1], (rows, row)
        mine = lax.broadcasted_iota(jnp.int32, shape, 0) == offset // together % rows
        if together > 1:
            place = lax.broadcasted_iota(jnp.int32, shape, 1) // (row // together)
            mine &= place == offset % together
            values = [jnp.concatenate([x] * together, 1) for x in values]
    for head, value in enumerate(values):
        at = head if len(window.shape) == 3 else pl.ds(head, 1)
        old = window[at]
        new = jnp.where(mine, value, old.astype(jnp.float32))
        window[at] = new.astype(window.dtype)
