"""The file `checksums` in an array's folder: the checksums of its chunks, in order.

Zarr keeps a checksum with each chunk. It shows that the chunk is whole, but not that it belongs to
this array: if files or folders of two arrays are exchanged, Zarr does not notice. So `checksums`
repeats them, 4 bytes per chunk, and a manifest lists that file under the array's name. A reader
compares only the chunks that it reads, for which it reads 20 more bytes each: the chunk's checksum
and its offset and size in the file.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

CHECKSUMS = "checksums"  # the file's name
NOWHERE = 2**64 - 1  # the offset and the size of a chunk that was never written


@dataclasses.dataclass(frozen=True)
class Grid:
    """How an array is divided into blocks, a file each, and blocks into chunks.

    Attributes:
        shape: of the array; the last blocks of an axis may reach beyond it.
        block: the shape of a block.
        chunk: the shape of a chunk; divides `block`.
    """

    shape: tuple[int, ...]
    block: tuple[int, ...]
    chunk: tuple[int, ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        """The number of blocks along each axis of the array."""
        return tuple(-(-n // b) for n, b in zip(self.shape, self.block, strict=True))

    @property
    def chunks(self) -> tuple[int, ...]:
        """The number of chunks along each axis of a block."""
        return tuple(b // c for b, c in zip(self.block, self.chunk, strict=True))

    def touched(self, index: tuple[slice, ...]) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """The blocks that a slice has elements in: each with its position and its chunks.

        A block's position is its index along each axis; chunks are numbered within their block in
        row-major order.
        """
        other_axes = (slice(None),) * (len(self.shape) - len(index))
        axes = []
        for i, span in enumerate((*index, *other_axes)):
            chunks = _chunks_along(span, self.shape[i], self.chunk[i])
            axes.append(_by_block(chunks, self.chunks[i]))
        for blocks in itertools.product(*axes):
            numbers = np.ravel_multi_index(np.ix_(*(x for _, x in blocks)), self.chunks)
            yield tuple(block for block, _ in blocks), numbers.ravel()


def _chunks_along(span: slice, size: int, chunk: int) -> np.ndarray:
    """The numbers of the chunks along an axis of `size` that a slice has elements in."""
    elements = range(*span.indices(size))
    if not elements:
        return np.arange(0)
    if elements.step < chunk:
        return np.arange(elements[0] // chunk, elements[-1] // chunk + 1)
    return np.arange(elements.start, elements.stop, elements.step) // chunk


def _by_block(chunks: np.ndarray, per_block: int) -> list[tuple[int, np.ndarray]]:
    """Chunks along an axis by block, each with the block's number and numbered within it."""
    blocks = chunks // per_block
    return [(int(block), chunks[blocks == block] % per_block) for block in np.unique(blocks)]


def create(folder: Path, grid: Grid) -> None:
    """Creates the file with zeros, for chunks that are not written yet."""
    with open(folder / CHECKSUMS, "wb") as file:
        file.truncate(_nbytes(grid))


def record(folder: Path, grid: Grid, index: tuple[slice, ...], synced: bool) -> None:
    """Copies the checksums of blocks from the blocks' files, which must be written already.

    Args:
        folder: the array's.
        grid: the array's.
        index: a slice that lies in the blocks.
        synced: whether to return only when they would survive a loss of power.
    """
    count = math.prod(grid.chunks)
    with open(folder / CHECKSUMS, "r+b") as file:
        for block, _ in grid.touched(index):
            stored = _stored(_file_of(folder, block), np.arange(count), count)
            file.seek(4 * count * int(np.ravel_multi_index(block, grid.blocks)))
            file.write(stored.tobytes())
        file.flush()
        if synced:
            os.fsync(file.fileno())


def parse(content: bytes, grid: Grid) -> np.ndarray:
    """The checksums in the file's content, [*blocks, chunks of a block] uint32.

    Raises:
        ValueError: if it has another size than the grid's.
    """
    if len(content) != _nbytes(grid):
        raise ValueError(f"its {CHECKSUMS} has {len(content)} bytes, not {_nbytes(grid)}")
    return np.frombuffer(content, "<u4").reshape(*grid.blocks, -1)


def check(folder: Path, grid: Grid, index: tuple[slice, ...], expected: np.ndarray) -> None:
    """Compares the checksums of the chunks that a slice has elements in.

    Args:
        folder: the array's.
        grid: the array's.
        index: the slice.
        expected: as `parse` returns them.

    Raises:
        ValueError: if a chunk belongs to another array.
        OSError: if a file cannot be read.
    """
    for block, numbers in grid.touched(index):
        file = _file_of(folder, block)
        stored = _stored(file, numbers, math.prod(grid.chunks))
        if not np.array_equal(stored, expected[block][numbers]):
            raise ValueError(f"{file} is another array's, or of another time")


def _nbytes(grid: Grid) -> int:
    return 4 * math.prod(grid.blocks) * math.prod(grid.chunks)


def _file_of(folder: Path, block: tuple[int, ...]) -> Path:
    return folder.joinpath("c", *map(str, block))


def _stored(file: Path, numbers: np.ndarray, count: int) -> np.ndarray:
    """The checksums of some chunks in a block's file; 0 for chunks that were never written.

    A chunk ends with its checksum of 4 bytes. The file ends with the offset and size of each chunk
    and a checksum of that index.

    Args:
        file: the block's file.
        numbers: of the chunks.
        count: how many chunks the block has.

    Raises:
        ValueError: if the file is too short.
    """
    checksums = np.zeros(len(numbers), "<u4")
    with open(file, "rb", buffering=0) as stream:
        descriptor = stream.fileno()
        index = _read(descriptor, 16 * count, os.fstat(descriptor).st_size - 16 * count - 4)
        offsets, sizes = np.frombuffer(index, "<u8").reshape(count, 2)[numbers].T
        written = offsets != NOWHERE
        ends = (offsets[written] + sizes[written] - 4).tolist()
        ending = b"".join(_read(descriptor, 4, end) for end in ends)
        checksums[written] = np.frombuffer(ending, "<u4")
    return checksums


def _read(descriptor: int, nbytes: int, start: int) -> bytes:
    content = os.pread(descriptor, nbytes, start) if 0 <= start < 2**63 else b""
    if len(content) < nbytes:
        raise ValueError("a chunk is not where it was written")
    return content
