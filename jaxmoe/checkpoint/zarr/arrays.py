"""Zarr arrays on disk, read and written by TensorStore.

An array is divided into blocks, a file each, and a block into chunks, each with a checksum. A block
is what is written at once and a chunk is what is read at once.
"""

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

# When 64 devices divide the experts of Scout or Maverick along one axis, chunks of this size make
# each device read at most twice its share; with chunks of 1 MiB it would be eight times.
CHUNK_BYTES = 2**16


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array on disk.

    Attributes:
        path: its folder.
        tensor: its elements, as TensorStore reads and writes them.
        checksums: those that the chunks must have; None: any that match their content.
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
        """The size of its elements in bytes."""
        return self.tensor.size * self.dtype.itemsize

    @property
    def grid(self) -> Grid:
        """How it is divided into blocks and chunks."""
        layout: Any = self.tensor.chunk_layout
        return Grid(self.shape, layout.write_chunk.shape, layout.read_chunk.shape)

    def read(
        self,
        index: Sequence[slice],
        axes: tuple[int, ...] | None = None,
        dtype: np.dtype | None = None,
    ) -> np.ndarray:
        """Reads a slice into contiguous memory.

        Args:
            index: a slice for each of the first axes; the other axes are read whole.
            axes: reorders the axes, as `np.transpose` does.
            dtype: what to cast to; default: as stored.

        Raises:
            UserError: if a chunk is missing, damaged or belongs to another array.
        """
        same = dtype is None or dtype == self.dtype
        part = (self.tensor if same else ts.cast(self.tensor, ts.dtype(dtype)))[tuple(index)]
        with readable(self.path):
            reading = (part if axes is None else part.transpose(axes)).read(order="C")
            if self.checksums is not None:  # TensorStore's threads read meanwhile
                checksums.check(self.path, self.grid, tuple(index), self.checksums)
            return reading.result()

    def check(self) -> None:
        """Reads the whole array block by block, only to check it.

        Raises:
            UserError: as `read`.
        """
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
    """Creates an array, in place of any that an interrupted run left there.

    Args:
        path: its folder.
        shape: its shape.
        dtype: its dtype.
        block: the shape of a block.
        chunk: the shape of a chunk; default: one of about `CHUNK_BYTES`.
        synced: whether a write ends only when it would survive a loss of power.

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
    """Opens an existing array.

    Args:
        path: its folder.
        listed: the content of its file of checksums; None if it has none, or is only written.
        synced: as for `create_array`.

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
    """Turns TensorStore's errors of reading into a UserError; a MemoryError passes."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged: {reason(error)}; make it again.") from error


@contextlib.contextmanager
def writes(path: Path) -> Iterator[None]:
    """Turns TensorStore's errors of writing into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}.") from error


def reason(error: Exception) -> str:
    """The first line of an exception's message without appended details; if empty, its type."""
    return str(error).partition("\n")[0].partition(" [")[0].rstrip(".") or type(error).__name__


def _spec(path: Path, synced: bool) -> dict[str, Any]:
    """TensorStore's description of an array; chunks that are missing are errors, not zeros."""
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
    """The content of `zarr.json`."""
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
    """A shape that tiles `shape`: its largest even axis is halved until it has `nbytes` or fewer.

    It may stay larger if no axis is even any more.
    """
    part = list(shape)
    while math.prod(part) * itemsize > nbytes:
        even = [size for size in part if size % 2 == 0]
        if not even:
            break
        part[part.index(max(even))] //= 2
    return part
