"""Multiplies up to 64 tokens by one or several matrices on TPUs, each of which is read once.

Shape letters: C tokens, rounded up to 8; D inputs, F outputs of all matrices together, n a tile of
outputs.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.arrays import pad_axis
from pallas_kernels.experts.tpu_products import multiply, static_for
from pallas_kernels.step.tpu_stream import (
    SLOTS,
    Outbox,
    buffers,
    copy_tile,
    in_slot,
    pad_tokens,
    share_of_core,
    stream,
    tile_at,
    tile_width,
)
from pallas_kernels.tpu import IN_HBM, LANES, SUBLANES, VMEM_BYTES, dot, in_hbm, num_cores


def matmul_tpu(
    x: Float[Array, "tokens *inputs"], weights: tuple[Any, ...], *, interpret=None
) -> Float[Array, "1 C F"]:
    """x @ concatenate(weights, axis=1) in float32; arguments as for `matmul_few`.

    XLA multiplies by one matrix of less than 128 outputs, such as a router: it stores that by
    columns. It stores heads [D, H, d] head by head, unless H is 2, 4 or 8.
    """
    widths = [math.prod(w.shape[1:]) for w in weights]
    if max(widths) < LANES:
        return dot(pad_axis(x.reshape(len(x), -1), 0, SUBLANES), weights[0])[None]
    weights = tuple(jnp.swapaxes(w, 0, 1) if len(w.shape) == 3 else w for w in weights)
    n, tokens = tile_width(weights, widths), -(-x.shape[0] // SUBLANES) * SUBLANES
    tiles = tuple(width // n for width in widths)
    kernel = pl.pallas_call(
        functools.partial(_kernel, static_for(weights[0], n), tiles),
        out_shape=jax.ShapeDtypeStruct((tokens, sum(widths)), jnp.float32),
        grid=(num_cores(),),
        in_specs=[
            pl.BlockSpec(x.shape, lambda core: (0,) * x.ndim),
            jax.tree.map(lambda _: IN_HBM, weights),
        ],
        out_specs=IN_HBM,
        scratch_shapes=[
            buffers(weights[0], n),
            pltpu.SemaphoreType.DMA((SLOTS,)),
            Outbox.types(tokens, n, jnp.float32),
            pltpu.VMEM((tokens, math.prod(x.shape[1:])), jnp.bfloat16),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret or False,
        name="matmul_few",
    )
    return kernel(x, in_hbm(weights))[None]


def _kernel(static, tiles, x_ref, matrices, out_ref, ring, copied, outbox, padded_ref):
    begin, end = share_of_core(sum(tiles))
    n, outbox = static.columns, Outbox(*outbox)
    pad_tokens(x_ref, padded_ref)

    def copies(tile, slot, act):
        first = 0
        for matrix, count in zip(matrices, tiles, strict=True):

            @pl.when((tile >= first) & (tile < first + count))
            def _(matrix=matrix, first=first):
                index = tile - first
                if len(matrix.shape) == 3:
                    source = tile_at(matrix, pl.ds(0, n), index)
                else:
                    source = tile_at(matrix, pl.ds(index * n, n))
                copy_tile(source, ring, slot, copied, act)

            first += count

    def to(tile):
        return out_ref.at[:, pl.ds(tile * n, n)]

    def use(tile, slot):
        value = multiply(static, padded_ref, in_slot(ring, slot), 0)
        outbox.put(tile - begin, value, to(tile))

    stream(begin, end, copies, use)
    outbox.close(end - begin, to(0))
