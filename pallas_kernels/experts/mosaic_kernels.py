"""Grouped matmul on Hopper for bfloat16 matrices, and its gradient with respect to the weights.

For blocks of 128 rows, two warpgroups compute 64 rows each of a tile of 128 x 256 (for a gated
product, of two tiles of 128 x 128), and a third copies memory. For smaller blocks, as in decoding,
the transposed product out^T = w^T x^T is computed: the matrix takes the 64 rows of wgmma, and is
streamed at the speed of memory.

Shape letters: R rows, D inputs, F outputs, E groups, N blocks of rows; m the rows of a block, n a
tile of F, k a step along D.
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
    WARPGROUP,
    Ring,
    accumulate,
    along_columns,
    along_rows,
    flat_grid,
    grid_indices,
    hopper_kernel,
    tile,
)

COMPUTE = 2  # warpgroups that compute, beside the one that copies
BLOCK = COMPUTE * WARPGROUP
STEP = 64  # elements of the summed axis that one step of the pipeline multiplies


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Sizes of the kernels for blocks of 128 rows.

    Attributes:
        columns: columns of a tile, summed over the matrices of a gated product.
        slots: pipeline depth, in steps.
        together: how many blocks of rows run concurrently per column tile, so that they share the
            matrix's tile in the L2 cache.
    """

    columns: int = 256
    slots: int = 4
    together: int = 8


def matmul_tiles(
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    group_of_block: jax.Array,
    row_scale: jax.Array | None = None,
    *,
    transposed: bool = False,
    config: TileConfig,
    interpret=None,
) -> jax.Array:
    """Multiplies each block of 128 rows by its group's matrix; returns [R, F].

    With two weights it returns silu(x @ w0) * (x @ w1). Blocks without a group are undefined.

    Args:
        x: rows, [R, D] bfloat16.
        weights: one or two, each [E, D, F], or [E, F, D] if `transposed`.
        group_of_block: [N] int32, E for a block without rows.
        row_scale: [R], multiplies the products of each row in float32; or None.
        transposed: whether to multiply by the transposed matrices.
        config: sizes of the kernel.
        interpret: parameters of the GPU interpreter, or None.
    """
    R, count = x.shape[0], len(weights)
    F = weights[0].shape[1 if transposed else 2]
    columns = config.columns // count
    w_tile = (columns, STEP) if transposed else (STEP, columns)
    buffers = (tile(config.slots, BLOCK, STEP), *[tile(config.slots, *w_tile)] * count)
    grid = (-(-R // (BLOCK * config.together)), F // columns, config.together)
    kernel = hopper_kernel(
        functools.partial(_tiles_kernel, transposed, grid, columns),
        out_type=jax.ShapeDtypeStruct((R, F), x.dtype),
        scratch_types=(Ring.types(buffers, COMPUTE), tile(COMPUTE, WARPGROUP, STEP)),
        **flat_grid(grid),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="grouped_matmul",
    )
    return kernel(x, weights, group_of_block, row_scale)


def _tiles_kernel(
    transposed, grid, columns, x_RD, weights_EDF, group_N, scale_R, out_RF, ring, out_mk
):
    ring = Ring(*ring)
    band, column, side = grid_indices(grid)
    block, outputs = band * grid[-1] + side, pl.ds(column * columns, columns)
    warpgroup = lax.axis_index("warpgroup")
    steps = x_RD.shape[1] // STEP
    group = group_N[jnp.minimum(block, group_N.shape[0] - 1)]
    busy = (block < group_N.shape[0]) & (group < weights_EDF[0].shape[0])

    @pl.when(busy & (warpgroup < COMPUTE))
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        ring.open()
        rows = pl.ds(block * BLOCK + warpgroup * WARPGROUP, WARPGROUP)

        def multiply(buffers, accumulators):
            x_mk, *weights = buffers
            mine = x_mk.at[pl.ds(warpgroup * WARPGROUP, WARPGROUP)]
            for acc, w in zip(accumulators, weights, strict=True):
                plgpu.wgmma(acc, mine, w.T if transposed else w)

        products = accumulate(ring, steps, multiply, (WARPGROUP, columns), len(weights_EDF))
        if scale_R is not None:
            scale = plgpu.load(scale_R.at[rows], layout=ROWS, optimized=False)
            products = [product * along_rows(scale, product) for product in products]
        out = products[0] if len(products) == 1 else jax.nn.silu(products[0]) * products[1]
        store(out, out_mk.at[warpgroup], out_RF.at[rows, outputs])

    @pl.when(busy & (warpgroup == COMPUTE))
    def _move():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, steps)
        def _(step):
            k = pl.ds(step * STEP, STEP)
            window = (group, outputs, k) if transposed else (group, k, outputs)
            x = x_RD.at[pl.ds(block * BLOCK, BLOCK), k]
            ring.fill(step, x, *(w.at[window] for w in weights_EDF))

        ring.drain(steps)


def store(values: jax.Array, staging, destination) -> None:
    """Writes an accumulator to global memory through the warpgroup's staging tile, in pieces."""
    width = staging.shape[1]
    for start in range(0, values.shape[1], width):
        part = values[:, start : start + width].astype(staging.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging[...] = part
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, destination.at[:, pl.ds(start, width)])
    plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """Sizes of the kernel for blocks of 8 to 64 rows.

    Attributes:
        slots: pipeline depth, in steps.
    """

    slots: int = 8


def matmul_stream(
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    group_of_block: jax.Array,
    row_scale: jax.Array | None = None,
    *,
    transposed: bool = False,
    config: StreamConfig,
    interpret=None,
) -> jax.Array:
    """Computes the same as `matmul_tiles`, for blocks of 8 to 64 rows."""
    R, count = x.shape[0], len(weights)
    F = weights[0].shape[1 if transposed else 2]
    rows = R // group_of_block.shape[0]
    buffers = (tile(config.slots, rows, STEP), *[tile(config.slots, STEP, STEP)] * count)
    grid = (group_of_block.shape[0], F // STEP)
    kernel = hopper_kernel(
        functools.partial(_stream_kernel, transposed, grid),
        out_type=jax.ShapeDtypeStruct((R, F), x.dtype),
        scratch_types=(Ring.types(buffers, 1), tile(rows, STEP)),
        **flat_grid(grid),
        num_threads=2,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="grouped_matmul_stream",
    )
    return kernel(x, weights, group_of_block, row_scale)


def _stream_kernel(transposed, grid, x_RD, weights_EDF, group_N, scale_R, out_RF, ring, out_mk):
    ring = Ring(*ring)
    block, column = grid_indices(grid)
    outputs, warpgroup = pl.ds(column * STEP, STEP), lax.axis_index("warpgroup")
    rows = pl.ds(block * out_mk.shape[0], out_mk.shape[0])
    steps, group = x_RD.shape[1] // STEP, group_N[block]
    busy = group < weights_EDF[0].shape[0]

    @pl.when(busy & (warpgroup == 0))
    def _compute():
        ring.open()

        def multiply(buffers, accumulators):
            x_mk, *weights = buffers
            for acc, w in zip(accumulators, weights, strict=True):
                plgpu.wgmma(acc, w if transposed else w.T, x_mk.T)

        shape = (STEP, out_mk.shape[0])
        products = accumulate(ring, steps, multiply, shape, len(weights_EDF))
        if scale_R is not None:
            scale = plgpu.load(scale_R.at[rows], layout=COLUMNS, optimized=False)
            products = [product * along_columns(scale, product) for product in products]
        out = products[0] if len(products) == 1 else jax.nn.silu(products[0]) * products[1]
        out_mk.T[...] = out.astype(out_mk.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_mk, out_RF.at[rows, outputs])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(busy & (warpgroup == 1))
    def _move():
        @pl.loop(0, steps)
        def _(step):
            k = pl.ds(step * STEP, STEP)
            window = (group, outputs, k) if transposed else (group, k, outputs)
            ring.fill(step, x_RD.at[rows, k], *(w.at[window] for w in weights_EDF))

        ring.drain(steps)


def weight_gradient_tiles(
    x: jax.Array, dy: jax.Array, first: jax.Array, count: jax.Array, *, config: TileConfig,
    interpret=None,
) -> jax.Array:  # fmt: skip
    """The sum of x^T dy over each group's rows, [E, D, F]; zeros for a group without rows.

    Args:
        x: rows, [R, D] bfloat16.
        dy: the product's cotangent, [R, F].
        first: [E], the index of each group's first block of 128 rows.
        count: [E], how many blocks each group has.
        config: sizes of the kernel.
        interpret: parameters of the GPU interpreter, or None.
    """
    (_, D), F, E = x.shape, dy.shape[1], first.shape[0]
    columns = config.columns
    buffers = (tile(config.slots, STEP, BLOCK), tile(config.slots, STEP, columns))
    kernel = hopper_kernel(
        functools.partial(_gradient_kernel, columns),
        out_type=jax.ShapeDtypeStruct((E, D, F), x.dtype),
        scratch_types=(Ring.types(buffers, COMPUTE), tile(COMPUTE, WARPGROUP, STEP)),
        grid=(E, D // BLOCK, F // columns),
        grid_names=("group", "rows", "columns"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="grouped_matmul_gradient",
    )
    return kernel(x, dy, first, count)


def _gradient_kernel(columns, x_RD, dy_RF, first_E, count_E, out_EDF, ring, out_mk):
    ring = Ring(*ring)
    group, warpgroup = lax.axis_index("group"), lax.axis_index("warpgroup")
    top, outputs = (
        lax.axis_index("rows") * BLOCK,
        pl.ds(lax.axis_index("columns") * columns, columns),
    )
    steps = count_E[group] * (BLOCK // STEP)

    @pl.when(warpgroup < COMPUTE)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        ring.open()

        def multiply(buffers, accumulators):
            x_km, dy_kn = buffers
            mine = x_km.at[:, pl.ds(warpgroup * WARPGROUP, WARPGROUP)]
            plgpu.wgmma(accumulators[0], mine.T, dy_kn)

        (out,) = accumulate(ring, steps, multiply, (WARPGROUP, columns), 1)
        rows = pl.ds(top + warpgroup * WARPGROUP, WARPGROUP)
        store(out, out_mk.at[warpgroup], out_EDF.at[group, rows, outputs])

    @pl.when(warpgroup == COMPUTE)
    def _move():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, steps)
        def _(step):
            k = pl.ds(first_E[group] * BLOCK + step * STEP, STEP)
            ring.fill(step, x_RD.at[k, pl.ds(top, BLOCK)], dy_RF.at[k, outputs])

        ring.drain(steps)
