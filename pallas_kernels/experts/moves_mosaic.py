"""Gathers rows on Hopper: x[source], optionally with an array added.

A thread block copies the rows of its part of the result into shared memory one by one, and writes
them out together. Rows pass through registers only if something is added.

Shape letters: N source rows, R rows of the result, D row width, cut into P pieces of W elements.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import SMEM_BYTES, hopper_kernel, why_not_hopper

DTYPES = ("bfloat16", "float32")
UNIT = 128  # row widths are multiples of it: the threads of a warpgroup get equal shares
PIECE = 256  # elements, the most that TMA copies along one axis
ROW_BYTES = 64 * 1024  # the widest row; two of them fit into shared memory
BLOCK_BYTES = 40 * 1024  # lets five blocks share a multiprocessor: some load while others store


@dataclasses.dataclass(frozen=True)
class MoveMosaicConfig:
    """Sizes of the kernel.

    Attributes:
        rows: how many rows a thread block copies.
    """

    rows: int = 8


def config_for(case) -> MoveMosaicConfig:
    """A config with as many rows, up to eight, as a fifth of shared memory holds."""
    return MoveMosaicConfig(rows=max(1, min(8, BLOCK_BYTES // _held_bytes(case))))


def why_not(case) -> str | None:
    """Says why the kernel cannot serve a `MoveCase`; None if it can."""
    if case.dtype not in DTYPES:
        return f"it takes {' or '.join(DTYPES)}, not {case.dtype}"
    if case.width % UNIT:
        return f"it takes rows that are multiples of {UNIT} elements, not {case.width}"
    if _row_bytes(case) > ROW_BYTES:
        return f"it takes rows of at most {ROW_BYTES} bytes, not {_row_bytes(case)}"
    return why_not_hopper(case.interpret)


def _row_bytes(case) -> int:
    return case.width * jnp.dtype(case.dtype).itemsize


def _held_bytes(case) -> int:
    """Bytes of shared memory that each row of a block takes."""
    return (2 if case.adds else 1) * _row_bytes(case)


def _check_rows(rows: int, case) -> None:
    most = min(PIECE, (SMEM_BYTES - 1024) // _held_bytes(case))  # the rest is for the barrier
    if not 1 <= rows <= most:
        raise ValueError(f"config has rows={rows}; a block of such rows has from 1 to {most}.")


def take(x: jax.Array, source: jax.Array, added: jax.Array | None, case) -> jax.Array:
    """x[source], zero where `source` is N, plus `added` if it is not None; returns [R, D].

    Args:
        x: [N, D].
        source: [R], indices from 0 to N.
        added: [R, D] or None.
        case: a `MoveCase` with a config.
    """
    R, rows = source.shape[0], case.config.rows
    _check_rows(rows, case)
    width = PIECE if case.width % PIECE == 0 else UNIT
    pieces = (case.width // width, width)
    if x.shape[0] == 1:  # the compiler drops indices of size-1 axes: index 1 would not give zeros
        x = jnp.pad(x, ((0, 1), (0, 0)))
    arrays = (x,) if added is None else (x, added)
    kernel = hopper_kernel(
        _take_kernel,
        out_type=jax.ShapeDtypeStruct((R, *pieces), x.dtype),
        scratch_types=(
            (plgpu.SMEM((rows, *pieces), x.dtype),) * len(arrays),
            plgpu.Barrier(num_arrivals=rows + len(arrays) - 1),
        ),
        grid=(-(-R // rows),),
        grid_names=("block",),
        interpret=case.interpret,
        kernel_name="take_rows",
    )
    cut = [array.reshape(array.shape[0], *pieces) for array in arrays]
    return kernel(cut, source.astype(jnp.int32)).reshape(R, case.width)


def _take_kernel(arrays, source_R, out_RPW, blocks, filled):
    (x_NPW, *added), (taken, *more) = arrays, blocks
    rows, R = taken.shape[0], source_R.shape[0]
    first = lax.axis_index("block") * rows
    here = pl.ds(first, rows)  # TMA clips copies at row R
    # All indices are loaded before the first copy, so that only that copy waits for one.
    sources = [source_R[jnp.minimum(first + i, R - 1)] for i in range(rows)]
    for array, block in zip(added, more, strict=True):
        plgpu.copy_gmem_to_smem(array.at[here], block, filled)
    for i, source in enumerate(sources):
        plgpu.copy_gmem_to_smem(x_NPW.at[source], taken.at[i], filled)  # zeros for row N
    plgpu.barrier_wait(filled)
    for block in more:
        _add(taken, block)
    plgpu.copy_smem_to_gmem(taken, out_RPW.at[here])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _add(total, more) -> None:
    """Adds `more` to `total` in float32 and rounds once; one row at a time, to save registers."""
    for i in range(total.shape[0]):
        values = total[i].astype(jnp.float32) + more[i].astype(jnp.float32)
        total[i] = values.astype(total.dtype)
    plgpu.commit_smem()
