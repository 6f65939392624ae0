"""A checkpoint -> the Hugging Face layout: `config.json`, safetensors, tokenizer files."""

import collections
import dataclasses
import functools
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checkpoint.convert.conversion import Report
from jaxmoe.checkpoint.convert.recode import FLOATS, decode
from jaxmoe.checkpoint.formats import compressed_tensors
from jaxmoe.checkpoint.formats.safetensors import DTYPES, INDEX, SINGLE
from jaxmoe.checkpoint.mapping import names
from jaxmoe.checkpoint.mapping.tensors import Block, Group, array_shapes, expand, join, main_dtype
from jaxmoe.checkpoint.store import (
    Checkpoint,
    Progress,
    copy_companions,
    no_progress,
    read_checkpoint,
)
from jaxmoe.checkpoint.zarr.arrays import StoredArray
from jaxmoe.errors import UserError
from jaxmoe.files.workspace import RESULT, prepared
from jaxmoe.hf_config import nest, to_hf
from jaxmoe.model.params import named_specs

SHARD_BYTES = 5 * 10**9

FLOAT_NAMES = ("bfloat16", "float16", "float32")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def export(
    checkpoint: str | Path,
    output: str | Path,
    progress: Progress = no_progress,
    *,
    weights: str | None = None,
) -> Report:
    """Writes a checkpoint in the Hugging Face layout that transformers reads.

    One file, or shards of at most 5 GB (or of one tensor) and their index. Every tensor keeps its
    dtype and its bytes. Matrices in fp8 or int8 with a scale an output become compressed-tensors'.
    The vision tower is there if the checkpoint has it. On an error nothing of the output is left.

    Args:
        checkpoint: the checkpoint's folder.
        output: the model's folder, which must not exist or be empty.
        progress: called after every block.
        weights: "bf16" or "float32" widens quantized matrices to it.

    Raises:
        UserError: for a bad checkpoint, matrices that the layout cannot hold as they are, or an
            output that exists or cannot be written.
    """
    opened = read_checkpoint(checkpoint)
    tensors = _tensors(opened, weights)
    files = _plan(tensors)
    total = sum(tensor.nbytes for tensor in tensors)
    with prepared(Path(output)) as workspace:
        folder = workspace / RESULT
        folder.mkdir()
        done = 0
        for name, some in files.items():
            for nbytes in _write(folder / name, some):
                done += nbytes
                progress(done, total)
        if SINGLE not in files:
            _write_json(folder / INDEX, _index(files, total))
        _write_json(folder / "config.json", _config(opened, _dtype(opened, tensors), weights))
        copy_companions(Path(checkpoint), folder)
    return Report(len(tensors), total, left_out=0)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor to be written; `blocks` are its contiguous parts in order."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _tensors(checkpoint: Checkpoint, weights: str | None) -> list[_Tensor]:
    """Every tensor, in model order."""
    widens = weights is not None
    formats = {} if widens else checkpoint.formats
    if not widens:
        _check_formats(checkpoint)
    arrays = checkpoint.open_arrays(vision=True)
    shapes = array_shapes(checkpoint.config, formats, checkpoint.specs(vision=True))
    # Blocks of gate and up follow one another, and each would decode all of its matrix again.
    matrix = functools.lru_cache(maxsize=2)(functools.partial(_matrix, checkpoint, arrays))
    tensors = []
    for group in expand(_rows(formats), shapes):
        read = _reader(checkpoint, group, arrays, matrix, weights)
        for name, shape in group.tensors.items():
            tensors.append(_tensor(group, name, _full(checkpoint, name), shape, *read))
    return tensors


def _rows(formats: Iterable[str]) -> tuple[names.Row, ...]:
    """compressed-tensors has a tensor for each expert."""
    apart = any(names.EACH in name for name in formats)
    return names.TEXT + (names.UNFUSED if apart else names.FUSED) + names.LAST + names.VISION


def _full(checkpoint: Checkpoint, name: str) -> str:
    """A tensor's name in the file: beside a vision tower the text model's have a prefix."""
    nested = checkpoint.outer is not None and not names.is_vision(name)
    return names.TEXT_PREFIX + name if nested else name


def _check_formats(checkpoint: Checkpoint) -> None:
    """Refuses what compressed-tensors with a scale an output does not hold."""
    specs = named_specs(checkpoint.config)
    for name, (kind, width) in checkpoint.formats.items():
        if kind not in compressed_tensors.NAMES or width != specs[name].matrix_shape[-2]:
            raise UserError(
                f"{checkpoint.path} holds {name} in {kind} with a scale for {width} inputs, which "
                "is not exported as it is; use --weights bf16."
            )
    kinds = {kind for kind, _ in checkpoint.formats.values()}
    if len(kinds) > 1:
        raise UserError(f"{checkpoint.path} mixes {' and '.join(kinds)}; use --weights bf16.")


def _reader(checkpoint: Checkpoint, group: Group, arrays, matrix, weights: str | None):
    """The dtype of a group's tensors, and a function from a slice to its parameters' blocks."""
    if group.ours[0] in checkpoint.formats:
        assert weights is not None
        dtype = np.dtype(FLOATS[weights])
        return dtype, lambda block: [
            _widened(checkpoint, name, matrix, block).astype(dtype) for name in group.ours
        ]
    held: list[StoredArray] = [arrays[name] for name in group.ours]
    dtypes = {array.dtype for array in held}
    if len(dtypes) > 1:
        raise UserError(f"{' and '.join(group.ours)} differ in dtype but share one tensor.")
    return dtypes.pop(), lambda block: [
        array.read(block.index).reshape(block.shape) for array in held
    ]


def _matrix(checkpoint: Checkpoint, arrays, name: str, expert: int | None) -> np.ndarray:
    """A quantized parameter, or one expert's part of it, in float32 and its own shape."""
    index = () if expert is None else (slice(expert, expert + 1),)
    qvalue, scale = (arrays[f"{name}.{x}"].read(index) for x in ("qvalue", "scale"))
    qvalue, scale = (x.reshape(x.shape[-2:]) for x in (qvalue, scale))
    shape = named_specs(checkpoint.config)[name].shape[len(index) :]
    return decode(qvalue, scale, checkpoint.formats[name].name).reshape(shape)


def _widened(checkpoint: Checkpoint, name: str, matrix, block: Block) -> np.ndarray:
    """A block of a quantized parameter."""
    if names.EACH not in name:
        return matrix(name, None)[block.index]
    expert, *inner = block.index
    return matrix(name, expert.start)[tuple(inner)]


def _tensor(group: Group, stored: str, name: str, shape, dtype: np.dtype, read) -> _Tensor:
    pieces = [piece for piece in group.pieces if piece.tensor == stored]

    def blocks():
        for piece in pieces:
            for block in piece.blocks(dtype.itemsize):
                yield join(group.layout, read(block))

    return _Tensor(name, shape, dtype, blocks)


def _plan(tensors: list[_Tensor]) -> dict[str, list[_Tensor]]:
    """Which file holds which tensors, in model order."""
    shards: list[list[_Tensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
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
        fields[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
    header = json.dumps(fields, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def _dtype(checkpoint: Checkpoint, tensors: list[_Tensor]) -> str:
    """What the model as a whole is in."""
    nbytes: dict[str, int] = collections.Counter()
    for tensor in tensors:
        if tensor.dtype.name in FLOAT_NAMES and not tensor.name.endswith(".weight_scale"):
            nbytes[tensor.dtype.name] += tensor.nbytes
    return main_dtype(nbytes, checkpoint.stated)


def _config(checkpoint: Checkpoint, dtype: str, weights: str | None) -> dict[str, Any]:
    config = to_hf(checkpoint.config, dtype)
    if checkpoint.outer is not None:
        config = nest(config, checkpoint.outer)
    if not checkpoint.formats or weights is not None:
        return config
    kind = next(iter(checkpoint.formats.values())).name
    return config | {
        compressed_tensors.KEY: compressed_tensors.describe(kind, _plain_modules(checkpoint))
    }


def _plain_modules(checkpoint: Checkpoint) -> list[str]:
    """Names of the Linear modules that are not quantized."""
    shapes = array_shapes(checkpoint.config, checkpoint.formats, checkpoint.specs(vision=True))
    return [
        _full(checkpoint, name).removesuffix(".weight")
        for group in expand(_rows(checkpoint.formats), shapes)
        for name in group.tensors
        if group.layout.in_axes and not group.ours[0].endswith(".scale")
    ]


def _index(files: dict[str, list[_Tensor]], total: int) -> dict:
    weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
