"""Grouped matmul on TPUs: a block of rows times a tile of its group's matrix at a time.

A tile holds all inputs of some outputs, as stored, and is copied while the one before is
multiplied. The blocks of a group follow each other, so that its tile is read once for all of them.
Blocks without a group come last, and the grid ends before them.

Shape letters: R rows, N blocks of b rows, E groups, D inputs, F outputs, n outputs of a tile, G
scales of an output.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.experts import grouped_megablox, grouped_xla
from pallas_kernels.experts.group_metadata import FEW_OF_TPUS
from pallas_kernels.experts.tpu_products import (
    INPUTS,
    Static,
    largest_divisor,
    multiply,
    static_for,
    why_not_quantized,
)
from pallas_kernels.quantized import QuantizedMatrix
from pallas_kernels.tpu import LANES, SUBLANES, VMEM_BYTES, mxu_fp8, num_cores, why_not_tpu

DTYPES = ("bfloat16", "float32")
MIB = 2**20
TILES_OF_CORE = 4  # which each core of a device has at least, since it waits for the first one
LEAST_TILE_BYTES = MIB // 2  # unless tiles are smaller, whose products begin and end too often
MXU = 256  # columns of an MXU since v6


@dataclasses.dataclass(frozen=True)
class GroupedTpuConfig:
    """Sizes of the kernel; each is an upper limit, below which what divides the widths is taken.

    Attributes:
        tile_bytes: bytes of the tiles that are multiplied at a time, of all matrices together.
        columns: outputs that are multiplied at a time.
        inputs: inputs that are multiplied at a time.
        resident_bytes: bytes of all rows; up to so many they stay on chip, and of more rows a block
            is copied for each tile.
        fp8: name of the fp8 type that the MXU takes.
    """

    tile_bytes: int = 2 * MIB
    columns: int = 512
    inputs: int = INPUTS
    resident_bytes: int = 8 * MIB
    fp8: str = "float8_e4m3fn"


def config_for(case) -> GroupedTpuConfig:
    """Larger tiles for many rows, which are read again for each tile."""
    tile_bytes = 2 * MIB if case.block <= FEW_OF_TPUS else 5 * MIB
    return GroupedTpuConfig(tile_bytes, fp8=mxu_fp8() or GroupedTpuConfig.fp8)


def why_not(case) -> str | None:
    """Says why the kernel cannot serve a `GroupedCase`; None if it can."""
    if case.dtype not in DTYPES:
        return f"it takes {' or '.join(DTYPES)}, not {case.dtype}"
    if case.format is not None and (reason := _why_not_quantized(case)):
        return reason
    if case.block % SUBLANES:
        return f"it takes blocks that are multiples of {SUBLANES} rows, not {case.block}"
    if case.width_in % LANES or case.width_out % LANES:
        widths = f"{case.width_in} and {case.width_out}"
        return f"it takes widths that are multiples of {LANES}, not {widths}"
    if _least_bytes(case) > VMEM_BYTES:
        return f"blocks of {case.block} rows of {case.width_in} inputs exceed its VMEM"
    return why_not_tpu(case.interpret)


def _why_not_quantized(case) -> str | None:
    if case.dtype != "bfloat16":
        return f"it multiplies quantized matrices by bfloat16, not {case.dtype}"
    sizes = case.group_size, case.width_in, case.groups
    return why_not_quantized(case.format, *sizes, case.interpret)


def _least_bytes(case) -> int:
    """Bytes of two blocks of rows, and of two tiles of each matrix of a gated product."""
    width = max(case.width_in, case.width_out)  # transposed, outputs are inputs
    itemsize = jnp.dtype(case.dtype).itemsize
    return 2 * width * (case.block * itemsize + 2 * LANES * (1 if case.format else itemsize))


def product(x, weights, group_of_block, row_scale, case, *, transposed: bool):
    """Computes `grouped_xla.product`, but rows of blocks without a group are undefined."""
    if case.format is not None and transposed:  # for gradients only
        return grouped_xla.product(x, weights, group_of_block, row_scale, case, transposed=True)
    (R, D), F = x.shape, weights[0].shape[1 if transposed else 2]
    N, E = group_of_block.shape[0], weights[0].shape[0]
    config = case.config
    n, columns = tile(weights, F, config)
    sizes = {"inputs": config.inputs, "fp8": config.fp8}
    static = static_for(weights[0], columns, transposed=transposed, **sizes)
    x = x.reshape(N, R // N, D)
    resident = x.size * x.dtype.itemsize <= config.resident_bytes
    if row_scale is not None:
        row_scale = jnp.broadcast_to(row_scale.reshape(N, -1, 1), (*x.shape[:2], LANES))
    out = pl.pallas_call(
        functools.partial(_kernel, static, resident),
        out_shape=jax.ShapeDtypeStruct((*x.shape[:2], F), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(F // n, jnp.sum(group_of_block < E, dtype=jnp.int32)),
            in_specs=[
                _rows_spec(x, resident),
                tuple(_weight_specs(w, n, static.outputs_first) for w in weights),
                None if row_scale is None else _rows_spec(row_scale, resident=False),
            ],
            out_specs=pl.BlockSpec((1, R // N, n), lambda tile, block, group: (block, 0, tile)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=case.interpret or False,
        name="grouped_matmul",
    )(group_of_block.astype(jnp.int32), x, weights, row_scale)
    return out.reshape(R, F)


def _rows_spec(rows: jax.Array, resident: bool) -> pl.BlockSpec:
    """All rows from the start, or a block at a time."""
    if resident:
        return pl.BlockSpec(rows.shape, lambda *_: (0, 0, 0), pipeline_mode=pl.Buffered(1))
    return pl.BlockSpec((1, *rows.shape[1:]), lambda tile, block, group: (block, 0, 0))


def _weight_specs(w, n: int, outputs_first: bool) -> Any:
    """A tile of the group's matrix, or of its values and scales."""
    if isinstance(w, QuantizedMatrix):
        values, scale = _weight_specs(w.qvalue, n, True), _weight_specs(w.scale, n, False)
        return QuantizedMatrix(values, scale, w.format)  # pyrefly: ignore  # specs for arrays
    if outputs_first:
        shape = (None, n, w.shape[2])
        return pl.BlockSpec(shape, lambda tile, block, group: (group[block], tile, 0))
    shape = (None, w.shape[1], n)
    return pl.BlockSpec(shape, lambda tile, block, group: (group[block], 0, tile))


def tile(weights, F: int, config: GroupedTpuConfig) -> tuple[int, int]:
    """n, how many outputs a tile has, and how many of them are multiplied at a time.

    Args:
        weights: the matrices of a call [E, D, F], or as `quantize_matrix` makes them.
        F: how many outputs they have.
    """
    values = [w.qvalue if isinstance(w, QuantizedMatrix) else w for w in weights]
    matrices = sum(x.size // x.shape[0] * x.dtype.itemsize for x in values)
    share = matrices // (TILES_OF_CORE * num_cores())
    most = max(LANES, min(max(share, LEAST_TILE_BYTES), config.tile_bytes) * F // matrices)
    unit = MXU if F % MXU == 0 and most >= MXU else LANES
    columns = largest_divisor(F, max(unit, min(most, config.columns)), unit)
    # Of a wider tile, the scales of 128 outputs alone would be an unaligned load.
    return (columns if columns == LANES else largest_divisor(F, most, columns)), columns


def _kernel(static: Static, resident: bool, group, x, weights, row_scale, out):
    rows = x.at[pl.program_id(1) if resident else 0]
    for first in range(0, out.shape[2], static.columns):
        products = [multiply(static, rows, w, first) for w in weights]
        if row_scale is not None:
            products = [row_scale[0, :, :1] * y for y in products]
        y = products[0] if len(products) == 1 else jax.nn.silu(products[0]) * products[1]
        out[0, :, pl.ds(first, static.columns)] = y.astype(out.dtype)


def weight_gradient(x, dy, group_of_block, groups: int, case):
    """Computes `grouped_xla.weight_gradient`, by the megablox kernel."""
    config = grouped_megablox.config_for(case)
    case = dataclasses.replace(case, config=config, interpret=bool(case.interpret))
    return grouped_megablox.weight_gradient(x, dy, group_of_block, groups, case)
