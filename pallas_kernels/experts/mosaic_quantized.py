"""Grouped matmul on Hopper with matrices of 8 or 4 bits, which are dequantized in registers.

The transposed product out^T = w^T x^T is computed for every block size: only the first operand of
wgmma may be in registers, and `QuantizedMatrix` stores w^T. Scales multiply float32 sums: after
every step if an output has several scales, otherwise once at the end.

Shape letters: R rows, D inputs, F outputs, E groups, N blocks of rows, G scales of an output; m the
rows of a block, n a tile of F, w the computing warpgroups, k the bytes or elements of a step of 128
inputs.
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
    grid_indices,
    half_masks,
    hopper_kernel,
    tile,
    widen,
)
from pallas_kernels.quantized import QuantizedMatrix

INPUTS = 128  # inputs that one step of the pipeline multiplies
HALF = INPUTS // 2


@dataclasses.dataclass(frozen=True)
class QuantizedConfig:
    """Sizes of the kernel.

    Attributes:
        slots: pipeline depth in steps, at most; fewer if shared memory is too small. A power of
            two makes the slot of a step cheap to compute.
        together: how many blocks of rows run concurrently per tile of outputs, so that they share
            the matrix's tile in the L2 cache.
    """

    slots: int = 4
    together: int = 8


def warpgroups(block: int) -> int:
    """How many warpgroups compute, 64 outputs each: two for blocks of more than 64 rows."""
    return 2 if block > WARPGROUP else 1


def _most_slots(rows: int, count: int, parts: int) -> int:
    """How many pipeline slots shared memory holds.

    For blocks of at most 64 rows, two thread blocks must fit on a multiprocessor.

    Args:
        rows: rows of a block.
        count: how many matrices are multiplied.
        parts: elements in a byte of a matrix.
    """
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
    """Computes the same as `matmul_tiles` for quantized matrices and blocks of 8 to 128 rows."""
    R, F = x.shape[0], weights[0].shape[2]
    parts = 2 if weights[0].format == "int4" else 1
    grouped = weights[0].group_size < x.shape[1]  # an output has several scales
    rows = R // group_of_block.shape[0]
    if grouped and rows > WARPGROUP:  # scaling at every step needs a second set of accumulators
        group_of_block, rows = jnp.repeat(group_of_block, rows // WARPGROUP), WARPGROUP
    compute = warpgroups(rows)
    together = config.together if compute > 1 else 1
    qvalues, scales = zip(*((w.qvalue, w.scale) for w in weights), strict=True)
    slots = min(config.slots, _most_slots(rows, len(weights), parts))
    matrix = tile(slots, compute * WARPGROUP, INPUTS // parts, dtype=qvalues[0].dtype)
    scale = plgpu.SMEM((slots, compute * WARPGROUP), jnp.float32)
    buffers = (
        tile(slots, rows, INPUTS),
        *[matrix] * len(weights),
        *[scale] * len(weights) * grouped,
    )
    grid = (-(-R // (rows * together)), F // (compute * WARPGROUP), together)
    kernel = hopper_kernel(
        functools.partial(_kernel, Wgmma(interpret is not None), parts, grouped, grid),
        out_type=jax.ShapeDtypeStruct((R, F), x.dtype),
        scratch_types=(Ring.types(buffers, compute), tile(compute, rows, WARPGROUP)),
        **flat_grid(grid),
        num_threads=compute + 1,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="grouped_matmul_quantized",
    )
    return kernel(x, qvalues, scales, group_of_block, row_scale)


def _kernel(
    mma, parts, grouped, grid, x_RD, qvalues_EFD, scales_EGF, group_N, scale_R, out_RF,
    ring, out_wmn,
):  # fmt: skip
    ring = Ring(*ring)
    compute, rows_a_block, _ = out_wmn.shape
    band, column, side = grid_indices(grid)
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
        outputs_here = pl.ds(first + warpgroup * WARPGROUP, WARPGROUP)
        masks = half_masks(group) if parts > 1 else ()
        products = _sums(mma, masks, ring, steps, mine, rows_a_block, len(qvalues_EFD))
        if not grouped:
            scales = (load(scale.at[group, 0, outputs_here], ROWS) for scale in scales_EGF)
            products = [y * along_rows(s, y) for y, s in zip(products, scales, strict=True)]
        if scale_R is not None:
            scale = load(scale_R.at[rows], COLUMNS)
            products = [y * along_columns(scale, y) for y in products]
        out = products[0] if len(products) == 1 else jax.nn.silu(products[0]) * products[1]
        staging = out_wmn.at[warpgroup]
        staging.T[...] = out.astype(staging.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, out_RF.at[rows, outputs_here])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(busy & (warpgroup == compute))
    def _move():
        if compute > 1:
            plgpu.set_max_registers(40, action="decrease")
        outputs_here = pl.ds(first, outputs)

        @pl.loop(0, steps)
        def _(step):
            k = pl.ds(step * INPUTS, INPUTS)
            stored = pl.ds(step * (INPUTS // parts), INPUTS // parts)
            matrices = (q.at[group, outputs_here, stored] for q in qvalues_EFD)
            scales = (
                s.at[group, step // steps_a_scale, outputs_here] for s in scales_EGF if grouped
            )
            ring.fill(step, x_RD.at[rows, k], *matrices, *scales)

        ring.drain(steps)


def _sums(mma, masks, ring, steps, mine, rows, count) -> tuple:
    """The product with each of `count` matrices, summed over steps: [64, rows] float32 each."""

    def step(t, sums):
        x_mk, *buffers = ring.take(t)
        matrices, scales = (
            [x.at[mine] for x in part] for part in (buffers[:count], buffers[count:])
        )
        sums = tuple(
            _add(mma, masks, total, w, x_mk, scale)
            for total, w, scale in zip(sums, matrices, scales or [None] * count, strict=True)
        )
        plgpu.commit_smem()  # a fence between this thread's reads and TMA's next write of the slot
        ring.release(t)
        return sums

    zeros = full((WARPGROUP, rows), 0.0, WGMMA)
    return lax.fori_loop(0, steps, step, (zeros,) * count)


def _add(mma, masks, total, w_nk, x_mk, scale_n):
    """total + w x^T for one step of inputs, or total + scale * w x^T if a scale is given."""
    columns = [pl.ds(part * HALF, HALF) for part in range(2)] if masks else [slice(None)]
    products = [(w, x_mk.at[:, k].T) for w, k in zip(widen(w_nk, masks), columns, strict=True)]
    if scale_n is None:
        return mma.sum(products, total)
    sums = mma.sum(products)
    return total + sums * along_rows(load(scale_n, ROWS), sums)


def load(ref, layout) -> jax.Array:
    """Loads a vector into registers in the layout of an accumulator's rows or columns."""
    return plgpu.load(ref, layout=layout, optimized=False)
