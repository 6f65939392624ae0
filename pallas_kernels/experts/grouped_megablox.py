"""Grouped matmul on TPUs by the megablox kernels that JAX ships.

The kernels take rows sorted by group and the number of rows of each group, which here are whole
blocks. Rows after the last group are skipped and undefined in the result.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp

from pallas_kernels.platform import target

# The package exports a function of the same name, which hides the module from a plain import.
megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")

# The matmul precision for each dtype: by default a TPU would round float32 operands to bfloat16.
PRECISION = {"bfloat16": "default", "float32": "highest"}
ROWS = 8  # the rows of a TPU's smallest tile, of which blocks are multiples
LANES = 128


@dataclasses.dataclass(frozen=True)
class GroupedMegabloxConfig:
    """Upper limits of tile sizes, chosen for the 16 MiB of on-chip memory that a kernel has.

    Attributes:
        row_bytes: bytes of a tile along the summed axis. Matrices whose inputs fit into it are
            read once for all blocks of a group.
        tile_bytes: bytes of a tile of a matrix.
        columns: columns of a tile of the product.
        gradient: rows, and columns, of a tile of the weights' gradient.
    """

    row_bytes: int = 16384
    tile_bytes: int = 5 * 2**20
    columns: int = 512
    gradient: int = 1024


def config_for(case) -> GroupedMegabloxConfig:
    """The default config; smaller tiles for float32, whose exact products need more memory."""
    if case.dtype == "bfloat16":
        return GroupedMegabloxConfig()
    return GroupedMegabloxConfig(8192, 2 * 2**20, 256, 512)


def why_not(case) -> str | None:
    """Says why the megablox kernels cannot serve a `GroupedCase`; None if they can."""
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
    """Computes `grouped_xla.product`, but rows of blocks without a group are undefined."""
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
    """Computes `grouped_xla.weight_gradient`."""
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
    """The tile sizes (rows, inputs, columns) of a product with `width` columns."""
    config, bytes_each = case.config, x.dtype.itemsize
    step = _whole_or(config.row_bytes // bytes_each, x.shape[1])
    columns = config.tile_bytes // (step * bytes_each) // LANES * LANES
    return case.block, step, _whole_or(max(LANES, min(config.columns, columns)), width)


def _whole_or(largest: int, size: int) -> int:
    """`size` if it is at most `largest`, else the size of equal parts, a multiple of 128 lanes."""
    parts = -(-size // largest)
    return size if parts == 1 else -(-size // (parts * LANES)) * LANES
