"""Checkpoints of others -> one that loads onto any mesh: tensor by tensor, in bounded memory."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checkpoint.arrays import open_array, path_of, read_slice
from jaxmoe.checkpoint.sources import Source, open_source
from jaxmoe.checkpoint.store import (
    KEY,
    STATE,
    Progress,
    Writer,
    copy_companions,
    model_metadata,
    no_progress,
    read_metadata,
)
from jaxmoe.checkpoint.transfer import Error, Job, plan, target_formats
from jaxmoe.checkpoint.workspace import RESULT, Resumable, writable
from jaxmoe.errors import UserError

SAMPLE_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Report:
    """What was converted or verified.

    Attributes:
        tensors: of the source that were read.
        nbytes: of these tensors.
        left_out: tensors of the source that were not.
        resumed: bytes that an earlier run had done.
        errors: what was quantized, by kind of parameter.
    """

    tensors: int
    nbytes: int
    left_out: int
    resumed: int = 0
    errors: Mapping[str, Error] = dataclasses.field(default_factory=dict)


def convert(
    source: str | Path,
    output: str | Path,
    progress: Progress = no_progress,
    *,
    weights: str | None = None,
    text_only: bool = False,
) -> Report:
    """Converts a checkpoint to one that `store.load` reads.

    Names, shapes, dtypes and file sizes are checked before anything is written. Killed and called
    again with the same arguments it goes on, and repeats at most the tensor that was being read;
    the result is the same to the byte.

    Args:
        source: a folder with `config.json` and safetensors, or with Meta's `consolidated.*.pth`.
        output: the checkpoint's folder, which must not exist or be empty.
        progress: called after every block.
        weights: "fp8", "int8" or "int4" quantizes matrices; "bf16" or "float32" widens quantized
            ones; None keeps every byte.
        text_only: leaves out the vision tower.

    Raises:
        UserError: for a bad source, an output that exists, a disk that is too small, or a workspace
            that another conversion left.
    """
    found = open_source(source, text_only)
    formats = target_formats(found, weights)
    jobs = plan(found, formats, weights)
    identity = _identity(found, weights, text_only)
    with Resumable(Path(output)) as workspace:
        done = _done(workspace, identity)
        if not workspace.note:
            workspace.begin(sum(_written(job) for job in jobs))
            workspace.write_note({"identity": identity, "done": done})
        errors = _Errors(workspace.note.get("errors", {}))
        total = sum(job.nbytes for job in jobs)
        resumed = sum(job.nbytes for job in jobs if job.name in done)
        with writable(workspace.output), Writer(workspace.path) as writer:
            _work(jobs, writer, workspace, errors, lambda done: progress(done, total))
            names = [name for job in jobs for name in job.arrays]
            writer.finish(names, KEY, _metadata(found, formats, identity, errors))
            copy_companions(Path(source), workspace.path / RESULT)
        workspace.finish()
    return Report(_count(found), total, len(found.left_out), resumed, errors.by_kind)


def _work(
    jobs: list[Job],
    writer: Writer,
    workspace: Resumable,
    errors: "_Errors",
    progress: Callable[[int], None],
) -> None:
    """Does the jobs that are not noted yet, and notes each."""
    identity, done = workspace.note["identity"], list(workspace.note["done"])
    count = sum(job.nbytes for job in jobs if job.name in done)
    progress(count)
    for job in jobs:
        if job.name in done:
            continue
        for nbytes in _write(job, writer, errors):
            count += nbytes
            progress(count)
        done.append(job.name)
        workspace.write_note({"identity": identity, "done": done, "errors": errors.by_kind})


def verify(source: str | Path, checkpoint: str | Path, progress: Progress = no_progress) -> Report:
    """Reads source and checkpoint again, and compares every byte.

    Raises:
        UserError: naming the first array that differs, or if the checkpoint was not made of this
            source, or ranks of a source differ in what all of them have.
    """
    checkpoint = Path(checkpoint)
    metadata = read_metadata(checkpoint, KEY, "make one with scripts/convert.py")
    options = metadata.get("conversion", {})
    weights, text_only = options.get("weights"), options.get("text_only", False)
    found = open_source(source, text_only)
    if options.get("sources") != _sources(found):
        raise UserError(f"{checkpoint} was made of other files than those in {source}.")
    made = model_metadata(found.config, found.dtype(found.groups[0]).name)
    if metadata["config"] != json.loads(json.dumps(made["config"])):
        raise UserError(f"{checkpoint} has another configuration than {source}; convert it again.")
    _check_copies(found)
    jobs = plan(found, target_formats(found, weights), weights)
    total, count = sum(job.nbytes for job in jobs), 0
    for job in jobs:
        for nbytes in _compare(job, checkpoint):
            count += nbytes
            progress(count, total)
    return Report(_count(found), total, len(found.left_out))


def _identity(found: Source, weights: str | None, text_only: bool) -> dict[str, Any]:
    """What a conversion is of; another must not go on with its workspace."""
    made = model_metadata(found.config, "bfloat16")
    return {
        "version": made["version"],
        "config": made["config"],
        "sources": _sources(found),
        "weights": weights,
        "text_only": text_only,
    }


def _sources(found: Source) -> list[dict[str, Any]]:
    """What tells the files from those of other models; of their data only samples are read."""
    folder = found.files.folder
    return [file | {"sample_sha256": _sample(folder / file["name"])} for file in found.files.files]


def _sample(file: Path) -> str:
    """Of the ends and the middle: headers of two models of one shape are equal."""
    digest, size = hashlib.sha256(), file.stat().st_size
    with open(file, "rb") as stream:
        for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
            stream.seek(start)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _done(workspace: Resumable, identity: dict[str, Any]) -> list[str]:
    """Names of the jobs that an interrupted run finished."""
    if not workspace.note:
        return []
    if workspace.note.get("identity") != identity:
        raise UserError(
            f"{workspace.path} is left from a conversion of another source, by another "
            "version or with other flags; delete it and run again."
        )
    return list(workspace.note["done"])


def _written(job: Job) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in job.arrays.values())


def _count(found: Source) -> int:
    return len(found.in_files)


class _Errors:
    """What quantizing loses, by kind of parameter."""

    def __init__(self, earlier: Mapping[str, list]):
        self.by_kind = {kind: Error(*values) for kind, values in earlier.items()}

    def add(self, name: str, error: Error | None) -> None:
        if error is not None:
            kind = re.sub(r"^layers\.\d+\.|\.(qvalue|scale)$", "", name)
            self.by_kind[kind] = self.by_kind.get(kind, Error(0, 0.0, 0.0)).plus(error)


def _write(job: Job, writer: Writer, errors: _Errors) -> Iterator[int]:
    """Makes a job's arrays; yields the bytes of each step; at the end all is on disk."""
    arrays = {name: writer.create(name, *array) for name, array in job.arrays.items()}
    for step in job.steps():
        writer.write([(arrays[name], index, data) for name, index, data in step.blocks])
        errors.add(step.blocks[0][0], step.error)
        yield step.nbytes
    writer.wait()


def _compare(job: Job, checkpoint: Path) -> Iterator[int]:
    arrays = {name: open_array(checkpoint / STATE / name) for name in job.arrays}
    for step in job.steps():
        for name, index, data in step.blocks:
            stored = read_slice(arrays[name], index)
            same = stored.dtype == data.dtype and stored.shape == data.shape
            if not same or stored.tobytes() != np.ascontiguousarray(data).tobytes():
                raise UserError(
                    f"{path_of(arrays[name])} differs from its source in {_range(index)}; "
                    "convert it again."
                )
        yield step.nbytes


def _check_copies(found: Source) -> None:
    """What every model-parallel rank has must be the same in all."""
    for group in found.groups:
        if not group.copies:
            continue
        first = next(iter(group.tensors))
        size = math.prod(group.tensors[first])
        expected = found.read(first, 0, size).tobytes()
        for name in group.copies:
            if found.read(name, 0, size).tobytes() != expected:
                raise UserError(
                    f"{found.files.folder} holds {name} with other numbers than {first}; download "
                    "both files again."
                )


def _range(index: tuple[slice, ...]) -> str:
    parts = (":" if s == slice(None) else f"{s.start}:{s.stop}" for s in index)
    return f"[{', '.join(parts)}]"


def _metadata(found: Source, formats, identity: dict[str, Any], errors: _Errors) -> dict[str, Any]:
    dtype = found.dtype(found.groups[0]).name
    conversion = {key: identity[key] for key in ("sources", "weights", "text_only")}
    made = model_metadata(found.config, dtype, formats, found.outer)
    return made | {"conversion": conversion | {"errors": errors.by_kind}}
