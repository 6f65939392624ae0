"""Exports a checkpoint to the Hugging Face layout: `config.json`, safetensors, tokenizer files."""

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checkpoint.convert.conversion import Report
from jaxmoe.checkpoint.convert.recode import FLOATS, decode
from jaxmoe.checkpoint.formats import compressed_tensors, safetensors
from jaxmoe.checkpoint.formats.safetensors import INDEX, SINGLE, TensorToWrite
from jaxmoe.checkpoint.mapping import names
from jaxmoe.checkpoint.mapping.tensors import Block, Group, array_shapes, expand, main_dtype
from jaxmoe.checkpoint.peft import Merging, PeftAdapter, read_adapter
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


def export(
    checkpoint: str | Path,
    output: str | Path,
    progress: Progress = no_progress,
    *,
    weights: str | None = None,
    adapter: str | Path | None = None,
    drop_selection_bias: bool = False,
) -> Report:
    """Writes a checkpoint in the Hugging Face layout that transformers reads.

    One file, or shards of at most 5 GB (or of one tensor) and their index. Every tensor keeps its
    dtype and its bytes. Matrices in fp8 or int8 with one scale per output are written as
    compressed-tensors. A vision tower is written if the checkpoint has one. After an error nothing
    of the output is left.

    Args:
        checkpoint: the checkpoint's folder.
        output: the model's folder, which must not exist or be empty.
        progress: called after every block with the bytes done and the bytes in all.
        weights: "bf16" or "float32" widens quantized matrices to that dtype.
        adapter: a folder that PEFT or a run saved; its matrices are added in float32, and the sums
            rounded once to the dtype of the tensors.
        drop_selection_bias: leaves out the biases by which routers choose experts, for which the
            layout has no place; the model then chooses other ones.

    Raises:
        UserError: if the checkpoint or the adapter is bad, matrices have a format, or routers
            a bias, that the layout does not have, or the output exists or cannot be written.
    """
    opened = read_checkpoint(checkpoint)
    notes: tuple[str, ...] = ()
    if opened.config.selection_bias:
        opened, notes = _without_bias(opened, drop_selection_bias)
    merging = (
        None if adapter is None else Merging(_adapter(opened, adapter, weights), opened.config)
    )
    tensors = _tensors(opened, weights, merging)
    files = safetensors.shard(tensors, SHARD_BYTES)
    total = sum(tensor.nbytes for tensor in tensors)
    with prepared(Path(output)) as workspace:
        folder = workspace / RESULT
        folder.mkdir()
        done = 0
        for name, in_file in files.items():
            for nbytes in safetensors.write_file(folder / name, in_file):
                done += nbytes
                progress(done, total)
        if SINGLE not in files:
            _write_json(folder / INDEX, safetensors.index_of(files, total))
        _write_json(folder / "config.json", _config(opened, _dtype(opened, tensors), weights))
        copy_companions(Path(checkpoint), folder)
    notes += merging.notes if merging else ()
    return Report(len(tensors), total, left_out=0, notes=notes)


def _without_bias(opened: Checkpoint, drops: bool) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint without the selection biases of its routers, and what to tell the user.

    Raises:
        UserError: if they are not to be left out.
    """
    if not drops:
        raise UserError(
            f"{opened.path} has routers that choose experts by a selection bias, for which the "
            "Hugging Face layout has no place; --drop-selection-bias leaves it out, with which the "
            "model chooses other experts."
        )
    config = dataclasses.replace(opened.config, selection_bias=False)
    note = "The selection bias is left out: the exported model chooses other experts."
    return dataclasses.replace(opened, config=config), (note,)


def _adapter(opened: Checkpoint, folder: str | Path, weights: str | None) -> PeftAdapter:
    """Opens the adapter to be added; refuses to round quantized matrices a second time."""
    adapter = read_adapter(folder, opened.config)
    if weights is None and (
        quantized := [name for name in adapter.ranks if name in opened.formats]
    ):
        raise UserError(
            f"{opened.path} holds {quantized[0]} in {opened.formats[quantized[0]].name}, to which "
            "no adapter is added without rounding it again; use --weights bf16."
        )
    return adapter


def _tensors(
    checkpoint: Checkpoint, weights: str | None, merging: Merging | None
) -> list[TensorToWrite]:
    """Every tensor to be written, in model order."""
    widens = weights is not None
    formats = {} if widens else checkpoint.formats
    if not widens:
        _check_formats(checkpoint)
    arrays = checkpoint.open_arrays()
    shapes = array_shapes(checkpoint.config, formats)
    # Blocks of gate and up alternate, and without the cache each would decode its whole matrix.
    matrix = functools.lru_cache(maxsize=2)(functools.partial(_matrix, checkpoint, arrays))
    tensors = []
    for group in expand(_rows(formats), shapes):
        dtype, read = _reader(checkpoint, group, arrays, matrix, weights)
        if merging is not None:
            read = functools.partial(_merged, merging, group.params, dtype, read)
        for name, shape in group.tensors.items():
            blocks = functools.partial(_blocks, group, name, dtype, read)
            tensors.append(TensorToWrite(_full_name(checkpoint, name), shape, dtype, blocks))
    return tensors


def _blocks(group: Group, tensor: str, dtype: np.dtype, read) -> Iterator[np.ndarray]:
    """The stored blocks of one of a group's tensors, in order."""
    for block in group.blocks(dtype.itemsize, tensor=tensor):
        yield group.layout.join([part.astype(dtype, copy=False) for part in read(block)])


def _merged(merging: Merging, params, dtype: np.dtype, read, block: Block) -> list[np.ndarray]:
    return merging.merged(params, block, read(block), dtype)


def _rows(formats: Iterable[str]) -> tuple[names.Row, ...]:
    """The rows of the table; quantized experts are a tensor each, as compressed-tensors has it."""
    unfused = any(map(names.has_experts, formats))
    return names.TEXT + (names.UNFUSED if unfused else names.FUSED) + names.LAST + names.VISION


def _full_name(checkpoint: Checkpoint, name: str) -> str:
    """A tensor's name in the file: beside a vision tower the text model's have a prefix."""
    nested = checkpoint.outer is not None and not names.is_vision(name)
    return names.TEXT_PREFIX + name if nested else name


def _check_formats(checkpoint: Checkpoint) -> None:
    """Refuses formats other than fp8 and int8 with one scale per output, and mixtures of both."""
    specs = named_specs(checkpoint.config)
    for name, (kind, group_size) in checkpoint.formats.items():
        if kind not in compressed_tensors.NAMES or group_size != specs[name].matrix_shape[-2]:
            raise UserError(
                f"{checkpoint.path} holds {name} in {kind} with a scale for {group_size} inputs, "
                "which is not exported as it is; use --weights bf16."
            )
    kinds = {kind for kind, _ in checkpoint.formats.values()}
    if len(kinds) > 1:
        raise UserError(f"{checkpoint.path} mixes {' and '.join(kinds)}; use --weights bf16.")


def _reader(
    checkpoint: Checkpoint, group: Group, arrays: dict[str, StoredArray], matrix, weights
) -> tuple[np.dtype, Callable[[Block], list[np.ndarray]]]:
    """The dtype of a group's tensors, and a function that reads a block of its parameters.

    What the function reads is to be rounded to that dtype.
    """
    if group.params[0] in checkpoint.formats:
        assert weights is not None
        dtype = np.dtype(FLOATS[weights])
        return dtype, lambda block: [_widened(name, matrix, block) for name in group.params]
    stored = [arrays[name] for name in group.params]
    dtypes = {array.dtype for array in stored}
    if len(dtypes) > 1:
        raise UserError(f"{' and '.join(group.params)} differ in dtype but share one tensor.")
    return dtypes.pop(), lambda block: [
        array.read(block.index).reshape(block.shape) for array in stored
    ]


def _matrix(checkpoint: Checkpoint, arrays, name: str, expert: int | None) -> np.ndarray:
    """A quantized parameter, or one expert's part of it, in float32 and its own shape."""
    index = () if expert is None else (slice(expert, expert + 1),)
    qvalue, scale = (arrays[f"{name}.{x}"].read(index) for x in ("qvalue", "scale"))
    qvalue, scale = (x.reshape(x.shape[-2:]) for x in (qvalue, scale))
    shape = named_specs(checkpoint.config)[name].shape[len(index) :]
    return decode(qvalue, scale, checkpoint.formats[name].name).reshape(shape)


def _widened(name: str, matrix, block: Block) -> np.ndarray:
    """A block of a quantized parameter, in float32."""
    if not names.has_experts(name):
        return matrix(name, None)[block.index]
    expert, *inner = block.index
    return matrix(name, expert.start)[tuple(inner)]


def _dtype(checkpoint: Checkpoint, tensors: list[TensorToWrite]) -> str:
    """The dtype that `config.json` gives the model."""
    nbytes: dict[str, int] = collections.Counter()
    for tensor in tensors:
        if tensor.dtype.name in FLOAT_NAMES and not tensor.name.endswith(".weight_scale"):
            nbytes[tensor.dtype.name] += tensor.nbytes
    return main_dtype(nbytes, checkpoint.stated)


def _config(checkpoint: Checkpoint, dtype: str, weights: str | None) -> dict[str, Any]:
    """The content of `config.json`."""
    config = to_hf(checkpoint.config, dtype)
    if checkpoint.outer is not None:
        config = nest(config, checkpoint.outer)
    if not checkpoint.formats or weights is not None:
        return config
    kind = next(iter(checkpoint.formats.values())).name
    described = compressed_tensors.describe(kind, _plain_modules(checkpoint))
    return config | {compressed_tensors.KEY: described}


def _plain_modules(checkpoint: Checkpoint) -> list[str]:
    """The names of the Linear modules that are not quantized."""
    shapes = array_shapes(checkpoint.config, checkpoint.formats)
    return [
        _full_name(checkpoint, name).removesuffix(".weight")
        for group in expand(_rows(checkpoint.formats), shapes)
        for name in group.tensors
        if group.layout.in_axes and not group.params[0].endswith(".scale")
    ]


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
