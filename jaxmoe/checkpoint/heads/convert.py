"""Converts a published head to a checkpoint that loads onto any mesh."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmoe.checkpoint.convert.conversion import write_job
from jaxmoe.checkpoint.convert.recode import plan
from jaxmoe.checkpoint.convert.source import Source
from jaxmoe.checkpoint.formats.safetensors import SafetensorsFolder
from jaxmoe.checkpoint.formats.tensor_files import TensorFiles
from jaxmoe.checkpoint.heads.layout import (
    EMBED,
    MEMBERS,
    OFFSETS,
    TOKEN_IDS,
    groups_of,
    layer_of,
)
from jaxmoe.checkpoint.heads.store import KEY, check_token_ids, head_metadata
from jaxmoe.checkpoint.mapping.match import match
from jaxmoe.checkpoint.mapping.tensors import BLOCK_BYTES
from jaxmoe.checkpoint.store import Checkpoint, Progress, no_progress, read_checkpoint
from jaxmoe.checkpoint.zarr.writer import Writer
from jaxmoe.eagle_config import ARCHITECTURES, EagleConfig, read_eagle_config
from jaxmoe.errors import UserError
from jaxmoe.files.atomic import writable
from jaxmoe.files.workspace import prepared
from jaxmoe.hf_config import read_object


class HeadReport(NamedTuple):
    """What a conversion has done.

    Attributes:
        config: of the head.
        tensors: how many tensors were read.
        nbytes: the bytes of the parameters.
        note: how the head's layer ids were read.
    """

    config: EagleConfig
    tensors: int
    nbytes: int
    note: str


def is_head(folder: str | Path) -> bool:
    """Whether a folder's `config.json`, if there is one, is that of an EAGLE-3 head."""
    if not (Path(folder) / "config.json").is_file():
        return False
    architectures = read_object(folder, "config.json").get("architectures")
    return isinstance(architectures, list) and any(x in ARCHITECTURES for x in architectures)


def convert_head(
    source: str | Path,
    output: str | Path,
    target: str | Path,
    progress: Progress = no_progress,
    *,
    layer_ids: Sequence[int] | None = None,
) -> HeadReport:
    """Converts a published head to one that `load_head` reads.

    All is checked before anything is written; a run that was killed begins again.

    Args:
        source: a folder with `config.json` and safetensors.
        output: the head's folder, which must not exist or be empty.
        target: the checkpoint of the model that it drafts for.
        progress: called after every block with the bytes done and the bytes in all.
        layer_ids: layers whose inputs the head reads, in place of those that its config names.

    Raises:
        UserError: if the source is bad, of another target or not supported; or the output exists.
    """
    folder, model = Path(source), read_checkpoint(target, text_only=True)
    config, note = read_eagle_config(folder, model.config, layer_ids)
    files = SafetensorsFolder(folder)
    count = len(files.tensors)
    token_ids = _token_ids(files, config)
    _check_embeddings(files, config, model)
    for name in (EMBED, OFFSETS, MEMBERS):
        files.tensors.pop(name, None)
    groups = groups_of(config, layer_of(files.tensors))
    stored_names, _ = match(model.config, groups, files, str(folder))
    opened = Source(model.config, None, {}, groups, files, stored_names, [])
    jobs, done = plan(opened, {}, None), 0
    total = sum(job.nbytes for job in jobs)
    with contextlib.ExitStack() as stack:
        workspace = stack.enter_context(prepared(Path(output)))
        stack.enter_context(writable(Path(output)))
        writer = stack.enter_context(Writer(workspace))
        for job in jobs:
            for step in write_job(job, writer):
                done += step.nbytes
                progress(done, total)
        ids = writer.create(TOKEN_IDS, token_ids.shape, token_ids.dtype, token_ids.shape)
        writer.write([(ids, (slice(None),), token_ids)])
        names = [TOKEN_IDS, *(name for job in jobs for name in job.arrays)]
        writer.finish(names, KEY, head_metadata(config))
    return HeadReport(config, count, total, f"{folder / 'config.json'} {note}")


def _token_ids(files: TensorFiles, config: EagleConfig) -> np.ndarray:
    """The target's ids [G] int32 of the draft vocabulary; of a whole one they need not be there.

    Raises:
        UserError: if they are missing, or cannot be.
    """
    count = config.draft_vocab_size
    if OFFSETS not in files.tensors:
        if count < config.vocab_size:
            raise UserError(
                f"{files.folder} lacks the tensor {OFFSETS}, which says which tokens the "
                f"{count} of its draft vocabulary are; download it again."
            )
        return np.arange(count, dtype=np.int32)
    entry = files.tensors[OFFSETS]
    if entry.shape != (count,) or entry.dtype not in ("I64", "I32"):
        raise UserError(
            f"{entry.file} holds {OFFSETS} as {entry.dtype} {list(entry.shape)}; expected I64 "
            f"[{count}]."
        )
    ids = np.arange(count) + files.read(OFFSETS, 0, count).astype(np.int64)
    check_token_ids(ids, config, str(entry.file))
    return ids.astype(np.int32)


def _check_embeddings(files: TensorFiles, config: EagleConfig, target: Checkpoint) -> None:
    """Refuses a head whose own embeddings, if it has some, are not its target's.

    They are compared in the narrower of the two dtypes.
    """
    if EMBED not in files.tensors:
        return
    entry, shape = files.tensors[EMBED], (config.vocab_size, config.hidden_size)
    own, other = files.dtype(EMBED), target.open_array("embed", shape)
    narrow = min(own, other.dtype, key=lambda dtype: dtype.itemsize)
    rows = max(1, BLOCK_BYTES // (4 * shape[1]))
    for start in range(0, shape[0] if entry.shape == shape else 0, rows):
        stop = min(start + rows, shape[0])
        block = files.read(EMBED, start * shape[1], (stop - start) * shape[1])
        stored = other.read((slice(start, stop),)).reshape(-1)
        if not np.array_equal(block.astype(narrow), stored.astype(narrow)):
            break
    else:
        if entry.shape == shape:
            return
    raise UserError(
        f"{entry.file} holds {EMBED}, which are not the embeddings of {target.path}; it is the "
        "head of another model."
    )
