"""Grouped matmul on TPUs: the megablox kernels that JAX ships.

They take rows sorted by group and the size of each group; here a group is whole blocks. Rows beyond
the last group are skipped, and undefined in the result.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp

from pallas_kernels.platform import target

# The package hides this module behind a function of its name.
megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")

# Of the kernels' products; by default a TPU would round float32 operands to bfloat16.
PRECISION = {"bfloat16": "default", "float32": "highest"}
ROWS = 8  # blocks are multiples of it: the rows of a TPU's smallest tile
LANES = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of tiles, for the 16 MiB of memory that a kernel has on chip.

    Attributes:
        row_bytes: the most of a row or column of the sum; within it, no matrix is read twice for
            the blocks of one group.
        tile_bytes: the most of a tile of a matrix.
        columns: the most of a tile of a product.
        gradient: rows, and columns, of a tile of the weights' gradient.
    """

    row_bytes: int = 16384
    tile_bytes: int = 5 * 2**20
    columns: int = 512
    gradient: int = 1024


def config_for(case) -> Config:
    """Exact products of float32 need room for its parts."""
    return Config() if case.dtype == "bfloat16" else Config(8192, 2 * 2**20, 256, 512)


def why_not(case) -> str | None:
    """Why a call cannot run on these kernels, or None."""
    if case.dtype not in PRECISION:
        return f"it takes {' or '.join(PRECISION)}, not {case.dtype}"
    if case.format is not None:
        return f"it takes plain matrices, not {case.format}"
    if case.block % ROWS:
        return f"it takes blocks that are multiples of {ROWS} rows, not {case.block}"
    device = target()
    if case.interpret is True or device.platform == "tpu":
        return None
    return f"it needs a TPU, and this is {device}"


def product(x, weights, group_of_block, row_scale, case, *, transposed: bool):
    """As `grouped_xla.product`; rows of blocks without a group are left undefined."""
    sizes = _group_rows(group_of_block, weights[0].shape[0], case.block)
    tiles = _product_tiles(x, weights[0].shape[1 if transposed else 2], case)
    with jax.default_matmul_precision(PRECISION[case.dtype]):
        products = [
            megablox.gmm(
                x, w, sizes, x.dtype, tiles, transpose_rhs=transposed, interpret=_interpret(case)
            )
            for w in weights
        ]
    scale = 1.0 if row_scale is None else row_scale[:, None]
    scaled = [scale * y.astype(jnp.float32) for y in products]
    y = scaled[0] if len(scaled) == 1 else jax.nn.silu(scaled[0]) * scaled[1]
    return y.astype(x.dtype)


def weight_gradient(x, dy, group_of_block, groups: int, case):
    """As `grouped_xla.weight_gradient`."""
    sizes = _group_rows(group_of_block, groups, case.block)
    tiles = (case.block, *(_whole_or(case.config.gradient, z.shape[1]) for z in (x, dy)))
    with jax.default_matmul_precision(PRECISION[case.dtype]):
        return megablox.tgmm(x.T, dy, sizes, x.dtype, tiles, interpret=_interpret(case))


def _interpret(case) -> bool:
    return case.interpret is True


def _group_rows(group_of_block, groups: int, block: int) -> jax.Array:
    member = group_of_block[:, None] == jnp.arange(groups, dtype=group_of_block.dtype)
    return block * jnp.sum(member, 0, dtype=jnp.int32)


def _product_tiles(x, width: int, case) -> tuple[int, int, int]:
    """Rows, a step of the sum, and columns."""
    config, bytes_each = case.config, x.dtype.itemsize
    step = _whole_or(config.row_bytes // bytes_each, x.shape[1])
    columns = config.tile_bytes // (step * bytes_each) // LANES * LANES
    return case.block, step, _whole_or(max(LANES, min(config.columns, columns)), width)


def _whole_or(largest: int, size: int) -> int:
    """All of it, or the even part that is no larger and in whole lanes."""
    parts = -(-size // largest)
    return size if parts == 1 else -(-size // (parts * LANES)) * LANES
