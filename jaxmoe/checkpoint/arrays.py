"""Arrays on disk: Zarr, one file a block, inside it chunks with a checksum each, by TensorStore."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jaxmoe.errors import UserError

# Read at once. Of 64 devices that divide the experts of Scout or Maverick along one axis, each
# reads at most twice its share; with 1 MiB it would be eight times.
CHUNK_BYTES = 2**16


def create_array(
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype,
    block: tuple[int, ...],
    chunk: tuple[int, ...] | None = None,
    synced: bool = True,
) -> ts.TensorStore:
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
        return ts.open(spec).result()


def open_array(path: Path, synced: bool = True) -> ts.TensorStore:
    """One array, to be read in slices, or to be written as `create_array` says.

    Raises:
        UserError: if it is missing or damaged.
    """
    with readable(path):
        return ts.open(_spec(path.resolve(), synced)).result()


def read_slice(
    array: ts.TensorStore, index: tuple[slice, ...], axes: tuple[int, ...] | None = None
) -> np.ndarray:
    """A slice of a stored array, its axes reordered as by `np.transpose` if given, contiguous.

    Raises:
        UserError: if a part of it is missing or damaged.
    """
    with readable(path_of(array)):
        part = array[index]
        part = part if axes is None else part.transpose(axes)
        return part.read(order="C").result()


def check_array(array: ts.TensorStore) -> None:
    """Reads all of an array, every chunk of which has a checksum.

    Raises:
        UserError: if a part of it is missing or damaged.
    """
    block: Any = array.chunk_layout.write_chunk.shape
    starts = (range(0, *x) for x in zip(array.shape, block, strict=True))
    for start in itertools.product(*starts):
        read_slice(array, tuple(slice(i, i + n) for i, n in zip(start, block, strict=True)))


def path_of(array: ts.TensorStore) -> Path:
    """Where an array lies."""
    assert array.kvstore is not None  # only arrays that are computed have none
    return Path(array.kvstore.path)


def nbytes_of(array: ts.TensorStore) -> int:
    """The size of an array's elements."""
    return array.size * array.dtype.numpy_dtype.itemsize


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns TensorStore's errors into a UserError; running out of memory stays what it is."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path} is damaged: {reason(error)}; make it again.") from error


@contextlib.contextmanager
def writes(path: Path) -> Iterator[None]:
    """The same of what cannot be written."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}.") from error


def reason(error: Exception) -> str:
    """The first line of a library's message, without its appended details."""
    return str(error).splitlines()[0].partition(" [")[0].rstrip(".")


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
        "chunk_shape": chunk or chunk_shape(block, dtype.itemsize),
        "codecs": codecs,
        "index_codecs": codecs,
    }
    return {
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": block}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def chunk_shape(block: tuple[int, ...], itemsize: int) -> list[int]:
    """Of what is read at once: the largest even axis is halved until it is small enough."""
    chunk = list(block)
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        even = [size for size in chunk if size % 2 == 0]
        if not even:
            break
        chunk[chunk.index(max(even))] //= 2
    return chunk
