"""Safetensors: reads a folder of files piece by piece, and writes files block by block.

The `safetensors` library is not used. It maps whole files into memory, where every page that was
touched counts as the process's, and a file that is cut short meanwhile kills the process; and it
writes a file from arrays that are all in memory. Here headers are parsed and bytes are read at
their offsets, so that memory holds one piece, and a bad file is an error.
"""

import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxmoe.checkpoint.formats.tensor_files import DTYPES, Entry, TensorFiles
from jaxmoe.errors import UserError
from jaxmoe.parsing import parse_json, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100 * 2**20  # bytes; the format's own limit
MAX_AXES = 32  # of a tensor; the published ones have at most 4


class SafetensorsFolder(TensorFiles):
    """The tensors of `model.safetensors`, or of the shards that `INDEX` names."""

    def __init__(self, folder: str | Path, name: str = SINGLE):
        """Reads the index and the headers of all files.

        Args:
            folder: the folder.
            name: of the one file.

        Raises:
            UserError: if a file is missing, cut short, outside the folder, or contradicts the
                index.
        """
        self.folder = Path(folder)
        self.tensors: dict[str, Entry] = {}
        self.files: list[dict[str, Any]] = []
        single, index = self.folder / name, self.folder / INDEX
        if single.exists():
            self._add_file(single)
        elif index.exists():
            self._add_shards(index)
        else:
            raise UserError(f"{self.folder} holds neither {name} nor {INDEX}; is it a model?")

    def _add_shards(self, index: Path) -> None:
        weight_map = _read_weight_map(index)
        for name in dict.fromkeys(weight_map.values()):
            self._add_file(_inside(self.folder, name, index))
        for tensor, entry in self.tensors.items():
            if self.folder / weight_map.get(tensor, "") != entry.file:
                raise UserError(
                    f"{entry.file} holds the tensor {tensor}, which {index} does not place there; "
                    "download both again."
                )
        for tensor, name in weight_map.items():
            if tensor not in self.tensors:
                raise UserError(
                    f"{self.folder / name} lacks the tensor {tensor} that {index} places there; "
                    "download both again."
                )

    def _add_file(self, file: Path) -> None:
        entries, record = _read_header(file)
        for name in entries.keys() & self.tensors.keys():
            raise UserError(
                f"{self.tensors[name].file} and {file} both hold the tensor {name}; download both "
                "again, or remove the file that does not belong to the model."
            )
        self.tensors |= entries
        self.files.append(record)


def _read_weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    is_map = isinstance(weight_map, dict)
    if not is_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} does not map tensors to file names; download it again.")
    return weight_map


def _inside(folder: Path, name: str, index: Path) -> Path:
    """The path of a file that an index names.

    The index comes from a stranger, so the file must lie in the folder. A link may lead into the
    folder, or, in the download cache of the Hugging Face hub, from `snapshots/<revision>` to its
    sibling `blobs`, where the cache keeps the files themselves.

    Raises:
        UserError: if it lies elsewhere, or the name is not one of a file.
    """
    path = PurePosixPath(name)
    if not path.is_absolute() and ".." not in path.parts:
        root = folder.resolve()
        allowed = [root]
        if root.parent.name == "snapshots":
            allowed.append(root.parent.parent / "blobs")
        try:
            file = (folder / path).resolve()
        except (ValueError, OSError, RuntimeError):  # no name of a file, or links in a circle
            raise UserError(
                f"{index} names the file {name!r:.300}, which cannot be one; download it again."
            ) from None
        if any(file.is_relative_to(parent) for parent in allowed):
            return folder / path
    raise UserError(
        f"{index} names the file {name!r:.300}, which lies outside {folder}; do not trust it."
    )


def _read_header(file: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The tensors of one file, and its entry in `TensorFiles.files`."""
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 0 < length <= min(size - 8, MAX_HEADER):
                raise UserError(
                    f"{file} is no safetensors file or is cut short; download it again."
                )
            header = stream.read(length)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; download it again.") from None
    entries = _parse_header(file, header, data_start=8 + length)
    _check_places(file, entries, 8 + length, size)
    digest = hashlib.sha256(prefix + header).hexdigest()
    return entries, {"name": file.name, "bytes": size, "header_sha256": digest}


def _parse_header(file: Path, header: bytes, data_start: int) -> dict[str, Entry]:
    try:
        fields = parse_json(header.decode(), f"The header of {file}")
        fields.pop("__metadata__", None)
        return {name: _parse_entry(file, field, data_start) for name, field in fields.items()}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} has a damaged header; download it again.") from None


def _parse_entry(file: Path, field: Mapping[str, Any], data_start: int) -> Entry:
    shape, (begin, end) = tuple(field["shape"]), field["data_offsets"]
    dtype = DTYPES.get(field["dtype"])
    if len(shape) > MAX_AXES or any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise ValueError("a size is no natural number")
    if end < begin or (dtype and end - begin != math.prod(shape) * dtype.itemsize):
        raise ValueError("the offsets do not fit the shape")
    return Entry(file, field["dtype"], shape, data_start + begin, end - begin)


def _check_places(file: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Refuses tensors that overlap or leave holes, which the format forbids."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != start:
            problem = "overlaps another" if entry.start < start else "lies behind a hole"
            raise UserError(f"{file} holds the tensor {name}, which {problem}; download it again.")
        start += entry.nbytes
    if start != size:
        raise UserError(
            f"{file} has {size} bytes but its header speaks of {start}; download it again."
        )


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """A tensor for `write_file`.

    Attributes:
        name: its name in the file.
        shape: its shape.
        dtype: one of `DTYPES`.
        blocks: a function that yields its contiguous parts in order.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(file: Path, tensors: list[TensorToWrite]) -> Iterator[int]:
    """Writes one safetensors file; yields the bytes of each block once it is written."""
    with open(file, "wb") as stream:
        header = _header(tensors)
        stream.write(struct.pack("<Q", len(header)))
        stream.write(header)
        for tensor in tensors:
            for block in tensor.blocks():
                stream.write(block.reshape(-1).view(np.uint8))
                yield block.nbytes


def _header(tensors: list[TensorToWrite]) -> bytes:
    """The header's JSON, padded so that the data begins at a multiple of 8 bytes."""
    fields: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        fields[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
    header = json.dumps(fields, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def shard(tensors: list[TensorToWrite], max_bytes: int) -> dict[str, list[TensorToWrite]]:
    """Distributes tensors over files in their order: one file, or shards.

    Args:
        tensors: all tensors of a model.
        max_bytes: the most of a shard; a tensor that is larger has a shard of its own.

    Returns:
        The tensors of each file, by the file's name.
    """
    shards: list[list[TensorToWrite]] = [[]]
    nbytes = 0
    for tensor in tensors:
        if shards[-1] and nbytes + tensor.nbytes > max_bytes:
            shards.append([])
            nbytes = 0
        shards[-1].append(tensor)
        nbytes += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": tensors
        for i, tensors in enumerate(shards, start=1)
    }


def index_of(files: Mapping[str, list[TensorToWrite]], total: int) -> dict[str, Any]:
    """The content of `INDEX` for shards that hold `total` bytes of tensors."""
    weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
