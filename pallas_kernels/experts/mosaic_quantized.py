"""Grouped matmul on Hopper with matrices of 8 or 4 bits, widened in registers.

The product is turned around, out^T = w^T x^T, for blocks of every size: only the first operand of
wgmma may be in registers, and a matrix stored by output is w^T as it lies. Scales multiply sums in
float32: of every step where inputs share scales in widths, otherwise once.

Shape letters: those of `mosaic_kernels`, and G widths of inputs that share a scale; k the bytes or
elements of a step of 128 inputs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import (
    COLUMNS,
    COMPILER_PARAMS,
    ROWS,
    SMEM_BYTES,
    WARPGROUP,
    WGMMA,
    Ring,
    Wgmma,
    along_columns,
    along_rows,
    flat_grid,
    full,
    half_masks,
    place_in,
    tile,
    widen,
)
from pallas_kernels.quantized import QuantizedMatrix

INPUTS = 128  # of a step
HALF = INPUTS // 2


@dataclasses.dataclass(frozen=True)
class QuantizedConfig:
    """Sizes of the kernel.

    Attributes:
        slots: steps in flight, where shared memory has room for so many.
        together: blocks of rows whose tiles run side by side and share the matrix in cache.
    """

    slots: int = 4  # a power of two: remainders are cheap
    together: int = 8


def warpgroups(block: int) -> int:
    """Each computes 64 outputs: two share rows where these are many."""
    return 2 if block > WARPGROUP else 1


def _room(rows: int, count: int, parts: int) -> int:
    """Slots that fit; of small blocks, two must fit on a multiprocessor at a time."""
    outputs = warpgroups(rows) * WARPGROUP
    step = 2 * rows * INPUTS + count * outputs * (INPUTS // parts + 4)
    memory = SMEM_BYTES - 1024 if outputs > WARPGROUP else SMEM_BYTES // 2 - 2048
    return (memory - 2 * rows * outputs) // step


def matmul_quantized(
    x: jax.Array,
    weights: tuple[QuantizedMatrix, ...],
    group_of_block: jax.Array,
    row_scale: jax.Array | None = None,
    *,
    config: QuantizedConfig,
    interpret=None,
) -> jax.Array:
    """As `matmul_tiles`, for blocks of 8 to 128 rows."""
    R, F = x.shape[0], weights[0].shape[2]
    parts = 2 if weights[0].format == "int4" else 1
    widths = weights[0].width < x.shape[1]
    rows = R // group_of_block.shape[0]
    if widths and rows > WARPGROUP:  # sums that are scaled at every step take registers twice
        group_of_block, rows = jnp.repeat(group_of_block, rows // WARPGROUP), WARPGROUP
    compute = warpgroups(rows)
    together = config.together if compute > 1 else 1
    qvalues, scales = zip(*((w.qvalue, w.scale) for w in weights), strict=True)
    slots = min(config.slots, _room(rows, len(weights), parts))
    matrix = tile(slots, compute * WARPGROUP, INPUTS // parts, dtype=qvalues[0].dtype)
    scale = plgpu.SMEM((slots, compute * WARPGROUP), jnp.float32)
    buffers = (
        tile(slots, rows, INPUTS),
        *[matrix] * len(weights),
        *[scale] * len(weights) * widths,
    )
    grid = (-(-R // (rows * together)), F // (compute * WARPGROUP), together)
    kernel = plgpu.kernel(
        functools.partial(_kernel, Wgmma(interpret is not None), parts, widths, grid),
        out_type=jax.ShapeDtypeStruct((R, F), x.dtype),
        scratch_types=(Ring.types(buffers, compute), tile(compute, rows, WARPGROUP)),
        **flat_grid(grid),
        num_threads=compute + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
        kernel_name="grouped_matmul_quantized",
    )
    return kernel(x, qvalues, scales, group_of_block, row_scale)


def _kernel(
    mma, parts, widths, grid, x_RD, qvalues_EFD, scales_EGF, group_N, scale_R, out_RF,
    ring, out_wmn,
):  # fmt: skip
    ring = Ring(*ring)
    compute, rows_a_block, _ = out_wmn.shape
    band, column, side = place_in(grid)
    warpgroup, outputs = lax.axis_index("warpgroup"), compute * WARPGROUP
    block, first = band * grid[-1] + side, column * outputs
    rows = pl.ds(block * rows_a_block, rows_a_block)
    steps = x_RD.shape[1] // INPUTS
    steps_a_scale = steps // scales_EGF[0].shape[1]
    group = group_N[jnp.minimum(block, group_N.shape[0] - 1)]
    busy = (block < group_N.shape[0]) & (group < scales_EGF[0].shape[0])

    @pl.when(busy & (warpgroup < compute))
    def _compute():
        if compute > 1:
            plgpu.set_max_registers(232, action="increase")
        ring.open()
        mine = pl.ds(warpgroup * WARPGROUP, WARPGROUP)
        there = pl.ds(first + warpgroup * WARPGROUP, WARPGROUP)
        masks = half_masks(group) if parts > 1 else ()
        products = _sums(mma, masks, ring, steps, mine, rows_a_block, len(qvalues_EFD))
        if not widths:
            scales = (load(scale.at[group, 0, there], ROWS) for scale in scales_EGF)
            products = [y * along_rows(s, y) for y, s in zip(products, scales, strict=True)]
        if scale_R is not None:
            scale = load(scale_R.at[rows], COLUMNS)
            products = [y * along_columns(scale, y) for y in products]
        out = products[0] if len(products) == 1 else jax.nn.silu(products[0]) * products[1]
        staging = out_wmn.at[warpgroup]
        staging.T[...] = out.astype(staging.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, out_RF.at[rows, there])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(busy & (warpgroup == compute))
    def _move():
        if compute > 1:
            plgpu.set_max_registers(40, action="decrease")
        there = pl.ds(first, outputs)

        @pl.loop(0, steps)
        def _(step):
            k = pl.ds(step * INPUTS, INPUTS)
            stored = pl.ds(step * (INPUTS // parts), INPUTS // parts)
            matrices = (q.at[group, there, stored] for q in qvalues_EFD)
            scales = (s.at[group, step // steps_a_scale, there] for s in scales_EGF if widths)
            ring.fill(step, x_RD.at[rows, k], *matrices, *scales)

        ring.drain(steps)


def _sums(mma, masks, ring, steps, mine, rows, count) -> tuple:
    """Of each matrix, [64, rows] in float32."""

    def step(t, sums):
        x_mk, *buffers = ring.take(t)
        matrices, scales = (
            [x.at[mine] for x in part] for part in (buffers[:count], buffers[count:])
        )
        sums = tuple(
            _add(mma, masks, total, w, x_mk, scale)
            for total, w, scale in zip(sums, matrices, scales or [None] * count, strict=True)
        )
        plgpu.commit_smem()  # threads have read the slot, and TMA will fill it
        ring.release(t)
        return sums

    zeros = full((WARPGROUP, rows), 0.0, WGMMA)
    return lax.fori_loop(0, steps, step, (zeros,) * count)


def _add(mma, masks, total, w_nk, x_mk, scale_n):
    """total + w x^T, of which w x^T is scaled where there is a scale."""
    columns = [pl.ds(part * HALF, HALF) for part in range(2)] if masks else [slice(None)]
    products = [(w, x_mk.at[:, k].T) for w, k in zip(widen(w_nk, masks), columns, strict=True)]
    if scale_n is None:
        return mma.sum(products, total)
    sums = mma.sum(products)
    return total + sums * along_rows(load(scale_n, ROWS), sums)


def load(ref, layout) -> jax.Array:
    """A vector as a warpgroup holds rows or columns of an accumulator."""
    return plgpu.load(ref, layout=layout, optimized=False)
