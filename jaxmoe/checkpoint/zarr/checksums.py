"""Which chunk belongs where: the checksums of an array's chunks, in order, in a file beside them.

Zarr keeps a checksum with each chunk. It says that the chunk is whole, not that it is this array's:
files or folders of two arrays that were exchanged pass. So `checksums`, a file of 4 bytes for each
chunk, repeats them in the array's folder, and a manifest binds that file to the array's name. A
reader compares the chunks that it reads, no others: 20 bytes of each are read once more, its
checksum and its place in the file.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

CHECKSUMS = "checksums"  # the file's name
NOWHERE = 2**64 - 1  # where a chunk that was never written lies, and its size


@dataclasses.dataclass(frozen=True)
class Grid:
    """How an array is cut into blocks, a file each, and these into chunks.

    Attributes:
        shape: of the array; at the ends of an axis, blocks reach beyond it.
        block: of a file's elements.
        chunk: of a chunk's elements; divides `block`.
    """

    shape: tuple[int, ...]
    block: tuple[int, ...]
    chunk: tuple[int, ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many there are along each axis."""
        return tuple(-(-n // b) for n, b in zip(self.shape, self.block, strict=True))

    @property
    def chunks(self) -> tuple[int, ...]:
        """How many a block has along each axis."""
        return tuple(b // c for b, c in zip(self.block, self.chunk, strict=True))

    def touched(self, index: tuple[slice, ...]) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """Blocks that a slice lies in: the place of each, and the numbers of its chunks."""
        whole = (slice(None),) * (len(self.shape) - len(index))
        axes = []
        for i, each in enumerate((*index, *whole)):
            chunks = _chunks_along(each, self.shape[i], self.chunk[i])
            axes.append(_by_block(chunks, self.chunks[i]))
        for blocks in itertools.product(*axes):
            numbers = np.ravel_multi_index(np.ix_(*(x for _, x in blocks)), self.chunks)
            yield tuple(block for block, _ in blocks), numbers.ravel()


def _chunks_along(span: slice, size: int, chunk: int) -> np.ndarray:
    """Numbers of the chunks of an axis that a slice has elements in."""
    places = range(*span.indices(size))
    if not places:
        return np.arange(0)
    if places.step < chunk:
        return np.arange(places[0] // chunk, places[-1] // chunk + 1)
    return np.arange(places.start, places.stop, places.step) // chunk


def _by_block(chunks: np.ndarray, each: int) -> list[tuple[int, np.ndarray]]:
    """Chunks of an axis by block, where each has as many; numbered within it."""
    blocks = chunks // each
    return [(int(block), chunks[blocks == block] % each) for block in np.unique(blocks)]


def create(folder: Path, grid: Grid) -> None:
    """Makes the file, for chunks that are not written yet."""
    with open(folder / CHECKSUMS, "wb") as file:
        file.truncate(_nbytes(grid))


def record(folder: Path, grid: Grid, index: tuple[slice, ...], synced: bool) -> None:
    """Notes the checksums of the blocks that a slice lies in, once these are in their files.

    Args:
        synced: returns when they would survive a loss of power.
    """
    each = 4 * math.prod(grid.chunks)
    with open(folder / CHECKSUMS, "r+b") as file:
        for block, _ in grid.touched(index):
            found = _stored(_file_of(folder, block), np.arange(each // 4), each // 4)
            file.seek(each * int(np.ravel_multi_index(block, grid.blocks)))
            file.write(found.tobytes())
        file.flush()
        if synced:
            os.fsync(file.fileno())


def parse(content: bytes, grid: Grid) -> np.ndarray:
    """What `check` needs, of the file's content.

    Raises:
        ValueError: if it is that of another grid.
    """
    if len(content) != _nbytes(grid):
        raise ValueError(f"its {CHECKSUMS} has {len(content)} bytes, not {_nbytes(grid)}")
    return np.frombuffer(content, "<u4").reshape(*grid.blocks, -1)


def check(folder: Path, grid: Grid, index: tuple[slice, ...], expected: np.ndarray) -> None:
    """Compares the checksums of the chunks that a slice has elements in.

    Raises:
        ValueError: if a chunk is another's.
        OSError: if a file cannot be read.
    """
    for block, numbers in grid.touched(index):
        file = _file_of(folder, block)
        found = _stored(file, numbers, math.prod(grid.chunks))
        if not np.array_equal(found, expected[block][numbers]):
            raise ValueError(f"{file} is another array's, or of another time")


def _nbytes(grid: Grid) -> int:
    return 4 * math.prod(grid.blocks) * math.prod(grid.chunks)


def _file_of(folder: Path, block: tuple[int, ...]) -> Path:
    return folder.joinpath("c", *map(str, block))


def _stored(file: Path, numbers: np.ndarray, count: int) -> np.ndarray:
    """The checksums that end some chunks of a file, which ends with the places of all `count`."""
    found = np.zeros(len(numbers), "<u4")
    with open(file, "rb", buffering=0) as stream:
        descriptor = stream.fileno()
        places = _read(descriptor, 16 * count, os.fstat(descriptor).st_size - 16 * count - 4)
        offsets, sizes = np.frombuffer(places, "<u8").reshape(count, 2)[numbers].T
        written = offsets != NOWHERE
        ends = (offsets[written] + sizes[written] - 4).tolist()
        found[written] = np.frombuffer(b"".join(_read(descriptor, 4, end) for end in ends), "<u4")
    return found


def _read(descriptor: int, nbytes: int, start: int) -> bytes:
    content = os.pread(descriptor, nbytes, start) if 0 <= start < 2**63 else b""
    if len(content) < nbytes:
        raise ValueError("a chunk is not where it was written")
    return content
