"""What the TPU kernels of a decode step share: matrices that arrive tile by tile, ahead of use.

A tile is some outputs of a matrix, which is a plain array [..., inputs, outputs] or a
`QuantizedMatrix`; the latter stays quantized until a tile is on chip.

Shape letters: C tokens, rounded up to 8; D inputs, n outputs of a tile.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantized import QuantizedMatrix
from pallas_kernels.tpu import LANES

SLOTS = 4  # tiles in flight; a power of two
TILE_BYTES = 3 * 2**19  # of a tile, at most: its copy takes a microsecond or two
Matrix = jax.Array | QuantizedMatrix


def tile_width(matrices: Sequence[Matrix], widths: Sequence[int]) -> int:
    """n: a multiple of 128 outputs, of which each matrix has a number of tiles.

    Args:
        matrices: [..., D, F].
        widths: outputs that tiles divide.
    """
    first = matrices[0]
    outputs = math.prod(first.shape[:-2]) * first.shape[-1]
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(first)) // outputs
    most = max(1, TILE_BYTES // size // LANES)
    tiles = (LANES * count for count in range(most, 0, -1))
    widths = [*widths, *(w.shape[-1] for w in matrices)]
    return next(n for n in tiles if all(width % n == 0 for width in widths))


def is_matrix(x) -> bool:
    """Whether x is a quantized matrix, rather than several arrays."""
    return isinstance(x, QuantizedMatrix)


def buffers(matrix: Matrix, n: int) -> Any:
    """Scratch for `SLOTS` tiles, of the matrix's structure."""
    if not isinstance(matrix, QuantizedMatrix):
        return pltpu.VMEM((SLOTS, matrix.shape[-2], n), matrix.dtype)
    sizes = (n, matrix.qvalue.shape[-1]), (matrix.scale.shape[-2], n)
    values, scale = (
        pltpu.VMEM((SLOTS, *size), x.dtype)
        for size, x in zip(sizes, (matrix.qvalue, matrix.scale), strict=True)
    )
    return QuantizedMatrix(values, scale, matrix.format)  # pyrefly: ignore  # types for arrays


def tile_at(matrix: Any, outputs: pl.Slice, *outer) -> Any:
    """References to a tile of the matrix at a reference; `outer` says which of several."""
    if not is_matrix(matrix):
        return matrix.at[*outer, :, outputs]
    values: Any = matrix.qvalue.at[*outer, outputs]
    scale: Any = matrix.scale.at[*outer, :, outputs]
    return QuantizedMatrix(values, scale, matrix.format)


def in_slot(ring: Any, slot) -> Any:
    """References to the tile of a slot."""
    return jax.tree.map(lambda ref: ref.at[slot], ring)


def pad_tokens(x_ref, padded_ref) -> None:
    """Copies tokens [T, D] or [T, H, d] into the first rows of [C, D]; the others are zeros."""
    padded_ref[...] = jnp.zeros_like(padded_ref)
    tokens, *heads, width = x_ref.shape
    for head in range(*heads or [1]):
        x = x_ref[:, head] if heads else x_ref[...]
        padded_ref[:tokens, head * width : (head + 1) * width] = x.astype(padded_ref.dtype)


def copy_tile(source: Any, ring: Any, slot, copied, act: Callable) -> None:
    """Does `act` with the copy of each part of a tile to its slot of the ring."""

    def copy(source, ring):
        act(pltpu.make_async_copy(source, ring.at[slot], copied.at[slot]))

    jax.tree.map(copy, source, ring)


def share_of_core(total) -> tuple[Any, Any]:
    """Which tiles, of so many, this core takes: from the first up to the second."""
    core, cores = pl.program_id(0), pl.num_programs(0)
    share = (total + cores - 1) // cores
    begin = jnp.minimum(core * share, total)
    return begin, jnp.minimum(begin + share, total)


def stream(begin, end, copies: Callable, use: Callable) -> None:
    """Uses tiles in order, while the next ones arrive.

    Args:
        begin, end: the first tile, and one past the last.
        copies: `copies(tile, slot, act)` does `act` with each copy that a tile needs.
        use: `use(tile, slot)`.
    """

    def start(tile) -> None:
        pl.when(tile < end)(lambda: copies(tile, tile & (SLOTS - 1), lambda copy: copy.start()))

    for ahead in range(SLOTS - 1):
        start(begin + ahead)

    @pl.loop(begin, end)
    def _(tile):
        start(tile + SLOTS - 1)
        copies(tile, tile & (SLOTS - 1), lambda copy: copy.wait())
        use(tile, tile & (SLOTS - 1))


@dataclasses.dataclass(frozen=True)
class Outbox:
    """Results that are copied to HBM while the next ones are computed."""

    tiles: Any  # [SLOTS, C, n] in VMEM
    copied: Any

    @staticmethod
    def types(tokens: int, n: int, dtype) -> list:
        """Scratch, in the order of the attributes."""
        return [pltpu.VMEM((SLOTS, tokens, n), dtype), pltpu.SemaphoreType.DMA((SLOTS,))]

    def put(self, number, value: jax.Array, to) -> None:
        """Sends the result of a number, which counts this core's from 0."""
        slot = number & (SLOTS - 1)
        copy = pltpu.make_async_copy(self.tiles.at[slot], to, self.copied.at[slot])
        pl.when(number >= SLOTS)(copy.wait)  # all copies are of one size
        self.tiles[slot] = value.astype(self.tiles.dtype)
        copy.start()

    def close(self, count, to) -> None:
        """Waits until all of `count` results are there; `to` is where any of them goes."""
        for slot in range(SLOTS):
            copy = pltpu.make_async_copy(self.tiles.at[slot], to, self.copied.at[slot])
            pl.when(slot < count)(copy.wait)
