"""Reads a folder of safetensors files in pieces, in memory bounded by the piece.

The `safetensors` library maps whole files into memory, where every page touched counts as the
process's, and a file cut short while it is read kills the process. Here the headers are parsed, and
bytes are read at their position into a buffer: nothing else is held, and a bad file is an error.
"""

import dataclasses
import hashlib
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.parsing import parse_json, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
MAX_HEADER = 100 * 2**20  # the format's own limit
MAX_AXES = 32  # of a tensor; a published one has at most 4


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies.

    Attributes:
        file: the file that holds it.
        dtype: its dtype in the format's spelling, such as `BF16`.
        shape: its shape.
        start: its first byte, counted from the beginning of the file.
        nbytes: its size.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class TensorFiles:
    """Tensors in files, read in pieces.

    Attributes:
        folder: where the files are.
        tensors: every tensor by name.
        files: what was opened: name, size in bytes and SHA-256 of the header of each file.
    """

    folder: Path
    tensors: dict[str, Entry]
    files: list[dict[str, Any]]

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor.

        Raises:
            UserError: if it is not one of `DTYPES`.
        """
        entry = self.tensors[name]
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{entry.file} holds {name} as {entry.dtype}, but only {', '.join(DTYPES)} can "
                "be read; use the model's bfloat16 release."
            )
        return DTYPES[entry.dtype]

    def read(self, name: str, start: int, count: int) -> np.ndarray:
        """Elements `start` to `start + count` of the flat tensor.

        Raises:
            UserError: if the file cannot be read, or has become shorter.
        """
        entry, dtype = self.tensors[name], self.dtype(name)
        data = np.empty(count, dtype)
        read_into(data.view(np.uint8), entry.file, entry.start + start * dtype.itemsize, name)
        return data

    def confirm(self) -> None:
        """Returns if what was read is what was written, as far as the format can tell.

        Raises:
            UserError: if it is not.
        """


def read_into(data: np.ndarray, file: Path, start: int, name: str) -> None:
    """Fills bytes from a file at `start`; `name` is the tensor's that lies there.

    Raises:
        UserError: if the file cannot be read, or has become shorter.
    """
    buffer = memoryview(data)
    try:
        with open(file, "rb", buffering=0) as stream:
            stream.seek(start)
            while buffer:
                done = stream.readinto(buffer)
                if not done:
                    raise UserError(f"{file} ends inside {name}; download it again.")
                buffer = buffer[done:]
    except OSError as error:
        raise UserError(
            f"{file} cannot be read at {name} ({error.strerror}); check its disk and run again."
        ) from None


class SafetensorsFolder(TensorFiles):
    """The tensors of `model.safetensors`, or of the shards that its index names."""

    def __init__(self, folder: str | Path):
        """Reads the index and all headers, no data.

        Raises:
            UserError: for a file that is missing, cut short, outside the folder, or contradicts
                the index.
        """
        self.folder = Path(folder)
        self.tensors: dict[str, Entry] = {}
        self.files: list[dict[str, Any]] = []
        single, index = self.folder / SINGLE, self.folder / INDEX
        if single.exists():
            self._add_file(single)
        elif index.exists():
            self._add_shards(index)
        else:
            raise UserError(f"{self.folder} holds neither {SINGLE} nor {INDEX}; is it a model?")

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
    """The file `name` of the folder, which a name from a downloaded file may not leave.

    A link may lead into the folder, or, in the download cache of the Hugging Face hub, from
    `snapshots/<revision>` to its sibling `blobs`, where the cache keeps the files themselves.
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
    """The tensors of one file, and its record: name, size and the header's SHA-256."""
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
    """Refuses tensors that overlap or leave holes, as the format does: all bytes are of one."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != start:
            problem = "overlaps another" if entry.start < start else "lies behind a hole"
            raise UserError(f"{file} holds the tensor {name}, which {problem}; download it again.")
        start += entry.nbytes
    if start != size:
        raise UserError(
            f"{file} has {size} bytes but its header speaks of {start}; download it again."
        )
