"""Grouped matmul on Hopper: chooses the kernel by block size and weight format."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.experts import grouped_xla
from pallas_kernels.experts.mosaic_kernels import (
    BLOCK,
    STEP,
    StreamConfig,
    TileConfig,
    matmul_stream,
    matmul_tiles,
    weight_gradient_tiles,
)
from pallas_kernels.experts.mosaic_quantized import (
    INPUTS,
    QuantizedConfig,
    matmul_quantized,
    warpgroups,
)
from pallas_kernels.mosaic import WARPGROUP, why_not_hopper
from pallas_kernels.quantized import QuantizedMatrix

STREAMED = (8, 16, 32, 64)  # block sizes, in rows, that the streaming kernel serves


@dataclasses.dataclass(frozen=True)
class GroupedMosaicConfig:
    """Sizes of the three kernels.

    Attributes:
        tiles: for blocks of 128 rows.
        stream: for smaller blocks.
        quantized: for matrices of 8 or 4 bits.
    """

    tiles: TileConfig = dataclasses.field(default_factory=TileConfig)
    stream: StreamConfig = dataclasses.field(default_factory=StreamConfig)
    quantized: QuantizedConfig = dataclasses.field(default_factory=QuantizedConfig)


def why_not(case) -> str | None:
    """Says why the Hopper kernels cannot serve a `GroupedCase`; None if they can."""
    if case.dtype != "bfloat16":
        return f"it takes bfloat16, not {case.dtype}"
    if case.block not in (*STREAMED, BLOCK):
        return f"it takes blocks of {(*STREAMED, BLOCK)} rows, not {case.block}"
    several = case.format is not None and case.group_size < case.width_in
    step, outputs = _tile(min(case.block, WARPGROUP) if several else case.block, case.format)
    if case.format is not None:
        if case.format == "int4" and case.group_size != INPUTS:
            return f"of int4 it takes one scale for {INPUTS} inputs, not {case.group_size}"
        if case.group_size % INPUTS and case.group_size != case.width_in:
            return (
                f"of {case.format} it takes one scale for all inputs or a multiple of {INPUTS}, "
                f"not for {case.group_size}"
            )
    if case.width_in % step or case.width_out % outputs:
        return (
            f"with blocks of {case.block} rows it takes widths that are multiples of {step} and "
            f"{outputs}, not {case.width_in} and {case.width_out}"
        )
    return why_not_hopper(case.interpret)


def _tile(rows: int, format: str | None) -> tuple[int, int]:
    """What widths are multiples of for blocks of so many rows: inputs of a step, and outputs."""
    if format is not None:
        return INPUTS, WARPGROUP * warpgroups(rows)
    size = TileConfig().columns if rows == BLOCK else STEP
    return size, size


def largest_block(w) -> int:
    """Rows of the largest block for which the kernels read a matrix once.

    They multiply 128 rows as two blocks of 64 if outputs have several scales, and not at all if
    tiles do not divide the widths.

    Args:
        w: matrices [E, D, F]; an expert has matrices [E, F, D] beside them, so that both widths are
            inputs and outputs.
    """
    _, inputs, outputs = w.shape
    quantized = isinstance(w, QuantizedMatrix)
    if quantized and w.group_size < inputs:
        return WARPGROUP
    unit = max(_tile(BLOCK, w.format if quantized else None))
    return WARPGROUP if inputs % unit or outputs % unit else BLOCK


def product(x, weights, group_of_block, row_scale, case, *, transposed: bool):
    """Computes `grouped_xla.product`, but rows of blocks without a group are undefined."""
    if isinstance(weights[0], QuantizedMatrix):
        return _quantized_product(x, weights, group_of_block, row_scale, case, transposed)
    tiles = case.block == BLOCK
    return (matmul_tiles if tiles else matmul_stream)(
        x,
        weights,
        group_of_block.astype(jnp.int32),
        row_scale,
        transposed=transposed,
        config=case.config.tiles if tiles else case.config.stream,
        interpret=case.interpret,
    )


def _quantized_product(x, weights, group_of_block, row_scale, case, transposed: bool):
    """Multiplies by quantized matrices; by their transposes, for gradients only, in plain JAX."""
    if transposed:
        return grouped_xla.product(x, weights, group_of_block, row_scale, case, transposed=True)
    return matmul_quantized(
        x,
        weights,
        group_of_block.astype(jnp.int32),
        row_scale,
        config=case.config.quantized,
        interpret=case.interpret,
    )


def weight_gradient(x, dy, group_of_block, groups: int, case):
    """Computes `grouped_xla.weight_gradient`; blocks below 128 rows are left to that function."""
    if case.block != BLOCK:
        return grouped_xla.weight_gradient(x, dy, group_of_block, groups, case)
    member = group_of_block[None] == jnp.arange(groups, dtype=group_of_block.dtype)[:, None]
    count = jnp.sum(member, 1, dtype=jnp.int32)
    return weight_gradient_tiles(
        x,
        dy,
        jnp.cumsum(count) - count,
        count,
        config=case.config.tiles,
        interpret=case.interpret,
    )
