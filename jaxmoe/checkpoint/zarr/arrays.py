"""Arrays on disk: Zarr, one file a block, inside it chunks with a checksum each, by TensorStore."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jaxmoe.checkpoint.zarr import checksums
from jaxmoe.checkpoint.zarr.checksums import Grid
from jaxmoe.errors import UserError

# Read at once. Of 64 devices that divide the experts of Scout or Maverick along one axis, each
# reads at most twice its share; with 1 MiB it would be eight times.
CHUNK_BYTES = 2**16


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array on disk.

    Attributes:
        path: its folder.
        tensor: its elements, as TensorStore reads and writes them.
        checksums: of its chunks, which what is read must have; None: each is only to be whole.
    """

    path: Path
    tensor: ts.TensorStore
    checksums: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype of its elements."""
        return self.tensor.dtype.numpy_dtype

    @property
    def nbytes(self) -> int:
        """The size of its elements."""
        return self.tensor.size * self.dtype.itemsize

    @property
    def grid(self) -> Grid:
        """How it is cut into files and chunks."""
        layout: Any = self.tensor.chunk_layout
        return Grid(self.shape, layout.write_chunk.shape, layout.read_chunk.shape)

    def read(
        self,
        index: Sequence[slice],
        axes: tuple[int, ...] | None = None,
        dtype: np.dtype | None = None,
    ) -> np.ndarray:
        """A slice, contiguous.

        Args:
            index: a slice for each of the first axes.
            axes: reorders the axes, as `np.transpose` does.
            dtype: what to cast to; default: as stored.

        Raises:
            UserError: if a part of it is missing, damaged or another array's.
        """
        same = dtype is None or dtype == self.dtype
        part = (self.tensor if same else ts.cast(self.tensor, ts.dtype(dtype)))[tuple(index)]
        with readable(self.path):
            reading = (part if axes is None else part.transpose(axes)).read(order="C")
            if self.checksums is not None:  # while TensorStore's threads read
                checksums.check(self.path, self.grid, tuple(index), self.checksums)
            return reading.result()

    def check(self) -> None:
        """Reads all of it, block by block; raises as `read`."""
        block = self.grid.block
        starts = (range(0, *x) for x in zip(self.shape, block, strict=True))
        for start in itertools.product(*starts):
            self.read([slice(i, i + n) for i, n in zip(start, block, strict=True)])


def create_array(
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype,
    block: tuple[int, ...],
    chunk: tuple[int, ...] | None = None,
    synced: bool = True,
) -> StoredArray:
    """A new array in place of any that an interrupted run left.

    Args:
        block: the shape of what is written at once, a file each.
        chunk: of what is read at once; default: about `CHUNK_BYTES`.
        synced: a write ends when it would survive a loss of power.

    Raises:
        UserError: if the file system refuses.
    """
    metadata = _zarr_metadata(shape, dtype, block, chunk)
    spec = {**_spec(path, synced), "create": True, "delete_existing": True, "metadata": metadata}
    with writes(path):
        array = StoredArray(path, ts.open(spec).result())
        checksums.create(path, array.grid)
    return array


def open_array(path: Path, listed: bytes | None, synced: bool = True) -> StoredArray:
    """One array, to be read in slices, or to be written as `create_array` says.

    Args:
        listed: what its file of checksums holds; None if it has none, or to write only.

    Raises:
        UserError: if it is missing or damaged.
    """
    with readable(path):
        array = StoredArray(path, ts.open(_spec(path.resolve(), synced)).result())
        if listed is None:
            return array
        return dataclasses.replace(array, checksums=checksums.parse(listed, array.grid))


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns TensorStore's errors into a UserError; running out of memory stays what it is."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged: {reason(error)}; make it again.") from error


@contextlib.contextmanager
def writes(path: Path) -> Iterator[None]:
    """The same of what cannot be written."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}.") from error


def reason(error: Exception) -> str:
    """The first line of a library's message, without appended details; else its name."""
    return str(error).partition("\n")[0].partition(" [")[0].rstrip(".") or type(error).__name__


def _spec(path: Path, synced: bool) -> dict[str, Any]:
    """Which array; data that is missing is an error, never read as zeros."""
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
        "context": {"file_io_sync": synced},
    }


def _zarr_metadata(
    shape: tuple[int, ...],
    dtype: np.dtype,
    block: tuple[int, ...],
    chunk: tuple[int, ...] | None = None,
) -> dict:
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    codecs = [little_endian, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": chunk or even_part(block, dtype.itemsize, CHUNK_BYTES),
        "codecs": codecs,
        "index_codecs": codecs,
    }
    return {
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": block}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def even_part(shape: tuple[int, ...], itemsize: int, nbytes: int) -> list[int]:
    """A shape that tiles another: the largest even axis is halved until it is small enough."""
    part = list(shape)
    while math.prod(part) * itemsize > nbytes:
        even = [size for size in part if size % 2 == 0]
        if not even:
            break
        part[part.index(max(even))] //= 2
    return part
