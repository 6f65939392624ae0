"""Hugging Face safetensors -> a checkpoint, tensor by tensor, in memory bounded by a block."""

import dataclasses
from pathlib import Path

from jaxmoe.checkpoint.names import StoredTensor, match_names, stored_tensors
from jaxmoe.checkpoint.reader import SafetensorsFolder
from jaxmoe.checkpoint.store import (
    RESULT,
    Progress,
    Writer,
    check_space,
    copy_companions,
    no_progress,
    prepared,
)
from jaxmoe.errors import UserError
from jaxmoe.hf_config import read_config


@dataclasses.dataclass(frozen=True)
class Report:
    """What was converted: tensors and bytes of the text model, and tensors left out."""

    tensors: int
    nbytes: int
    left_out: int


def convert(source: str | Path, output: str | Path, progress: Progress = no_progress) -> Report:
    """Converts a Hugging Face checkpoint, text-only or multimodal, to one that `store.load` reads.

    Every tensor keeps its dtype and its bytes. Vision tensors are left out. All names, shapes and
    file sizes are checked before anything is written; on an error nothing of the output is left.

    Args:
        source: a folder with `config.json` and safetensors.
        output: the checkpoint's folder, which must not exist or be empty.
        progress: called after every block.

    Raises:
        UserError: for a bad source, an output that exists, or a disk that is too small.
    """
    source, output = Path(source), Path(output)
    config = read_config(source)
    folder = SafetensorsFolder(source)
    found = match_names(config, folder.tensors, str(source))
    tensors = stored_tensors(config)
    for tensor in tensors:
        _check_shape(folder, found.names[tensor.name], tensor)
    total = sum(folder.tensors[found.names[tensor.name]].nbytes for tensor in tensors)
    with prepared(output) as workspace:
        check_space(workspace, total)
        with Writer(workspace) as writer:
            done = 0
            for tensor in tensors:
                for nbytes in _copy(folder, found.names[tensor.name], tensor, writer):
                    done += nbytes
                    progress(done, total)
            dtype = folder.dtype(found.names[tensors[0].name]).name
            writer.finish(config, dtype, folder.files)
        copy_companions(source, workspace / RESULT)
    return Report(len(tensors), total, len(found.left_out))


def _check_shape(folder: SafetensorsFolder, name: str, tensor: StoredTensor) -> None:
    folder.dtype(name)
    entry = folder.tensors[name]
    if entry.shape != tensor.stored_shape:
        raise UserError(
            f"{entry.file} holds {name} with shape {list(entry.shape)}, but config.json asks for "
            f"{list(tensor.stored_shape)}; correct config.json or download the model again."
        )


def _copy(folder: SafetensorsFolder, name: str, tensor: StoredTensor, writer: Writer):
    """Copies one tensor; yields the bytes of each block."""
    dtype = folder.dtype(name)
    step = tensor.block_shape(dtype.itemsize)
    arrays = [writer.create(ours, tensor.shape, dtype, step) for ours in tensor.ours]
    for block in tensor.blocks(dtype.itemsize):
        data = folder.read(name, block.start, block.count)
        parts = tensor.layout.split(data, block.shape)
        writer.write([(a, block.index, part) for a, part in zip(arrays, parts, strict=True)])
        yield data.nbytes
