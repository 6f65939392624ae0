"""A checkpoint -> the Hugging Face layout: `config.json`, safetensors, tokenizer files."""

import itertools
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxmoe.checkpoint.convert import Report
from jaxmoe.checkpoint.names import StoredTensor, stored_tensors
from jaxmoe.checkpoint.reader import DTYPES, INDEX, SINGLE
from jaxmoe.checkpoint.store import (
    RESULT,
    Progress,
    copy_companions,
    no_progress,
    open_arrays,
    prepared,
    read_slice,
)
from jaxmoe.errors import UserError
from jaxmoe.hf_config import to_hf

SHARD_BYTES = 5 * 10**9

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def export(checkpoint: str | Path, output: str | Path, progress: Progress = no_progress) -> Report:
    """Writes a checkpoint in the text-only Hugging Face layout that transformers reads.

    One file, or shards of at most 5 GB (or of one tensor) and their index. Every tensor keeps its
    dtype and its bytes. On an error nothing of the output is left.

    Args:
        checkpoint: the checkpoint's folder.
        output: the model's folder, which must not exist or be empty.
        progress: called after every block.

    Raises:
        UserError: for a bad checkpoint, or an output that exists or cannot be written.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    config, arrays = open_arrays(checkpoint)
    files = _plan([_Tensor(tensor, arrays) for tensor in stored_tensors(config)])
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    with prepared(output) as workspace:
        folder = workspace / RESULT
        folder.mkdir()
        done = 0
        for name, tensors in files.items():
            for nbytes in _write(folder / name, tensors):
                done += nbytes
                progress(done, total)
        if SINGLE not in files:
            _write_json(folder / INDEX, _index(files, total))
        first = next(itertools.chain(*files.values()))
        _write_json(folder / "config.json", to_hf(config, first.dtype.name))
        copy_companions(checkpoint, folder)
    return Report(sum(map(len, files.values())), total, left_out=0)


class _Tensor:
    """A tensor to be written, and the arrays that it is made of."""

    def __init__(self, stored: StoredTensor, arrays: dict):
        self.stored = stored
        self.arrays = [arrays[name] for name in stored.ours]
        dtypes = {array.dtype.numpy_dtype for array in self.arrays}
        if len(dtypes) > 1:
            raise UserError(f"{' and '.join(stored.ours)} differ in dtype but share one tensor.")
        self.dtype: np.dtype = dtypes.pop()

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored.stored_shape) * self.dtype.itemsize

    def blocks(self) -> Iterator[np.ndarray]:
        layout = self.stored.layout
        axes = layout.stored_axes(len(self.stored.shape))
        for block in self.stored.blocks(self.dtype.itemsize):
            yield layout.join([read_slice(array, block.index, axes) for array in self.arrays])


def _plan(tensors: list[_Tensor]) -> dict[str, list[_Tensor]]:
    """Which file holds which tensors, in model order."""
    shards: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in (*shards[-1], tensor)) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards, start=1)
    }


def _write(file: Path, tensors: list[_Tensor]) -> Iterator[int]:
    """Writes one safetensors file, header first; yields the bytes of each block."""
    with open(file, "wb") as stream:
        header = _header(tensors)
        stream.write(struct.pack("<Q", len(header)))
        stream.write(header)
        for tensor in tensors:
            for block in tensor.blocks():
                stream.write(block.reshape(-1).view(np.uint8))
                yield block.nbytes


def _header(tensors: list[_Tensor]) -> bytes:
    """The header's JSON, padded so that the data begins at a multiple of 8 bytes."""
    fields: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        fields[tensor.stored.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": tensor.stored.stored_shape,
            "data_offsets": (begin, end),
        }
    header = json.dumps(fields, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def _index(files: dict[str, list[_Tensor]], total: int) -> dict:
    weight_map = {tensor.stored.name: name for name, tensors in files.items() for tensor in tensors}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
