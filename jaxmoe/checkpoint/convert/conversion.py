"""Checkpoints of others -> one that loads onto any mesh: tensor by tensor, in bounded memory."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checkpoint.convert.recode import FLOATS, Error, Job, Step, plan, target_formats
from jaxmoe.checkpoint.convert.source import Source, open_source
from jaxmoe.checkpoint.store import (
    KEY,
    REMEDY,
    Progress,
    copy_companions,
    model_metadata,
    no_progress,
)
from jaxmoe.checkpoint.zarr.manifest import is_finished, open_finished
from jaxmoe.checkpoint.zarr.writer import Writer
from jaxmoe.errors import UserError
from jaxmoe.files.atomic import writable
from jaxmoe.files.workspace import RESULT, Resumable, boot

SAMPLE, SAMPLE_BYTES = "sample_sha256", 2**20


@dataclasses.dataclass(frozen=True)
class Report:
    """What was converted or verified.

    Attributes:
        tensors: of the source that were read.
        nbytes: of these tensors.
        left_out: tensors of the source that were not.
        resumed: bytes that an earlier run had done; all, where it had finished.
        errors: what was quantized, by kind of parameter.
        notes: sentences about what a user may not expect.
    """

    tensors: int
    nbytes: int
    left_out: int
    resumed: int = 0
    errors: Mapping[str, Error] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def convert(
    source: str | Path,
    output: str | Path,
    progress: Progress = no_progress,
    *,
    weights: str | None = None,
    text_only: bool = False,
    ignore_unknown: bool = False,
) -> Report:
    """Converts a checkpoint to one that `store.load` reads.

    Names, shapes, dtypes and file sizes are checked before anything is written. Killed and called
    again with the same arguments it goes on, and repeats at most the tensor that was being read, or
    after a restart of the system what that lost; the result is the same to the byte. Finished and
    called again, it does nothing.

    Args:
        source: a folder with `config.json` and safetensors, or with Meta's `consolidated.*.pth`.
        output: the checkpoint's folder, which must not exist or be empty.
        progress: called after every block.
        weights: "fp8", "int8" or "int4" quantizes matrices; "bf16" or "float32" widens quantized
            ones; None keeps every byte.
        text_only: leaves out the vision tower.
        ignore_unknown: goes on without the keys of the configuration that are not known.

    Raises:
        UserError: for a bad source, an output that exists, a disk that is too small, or a workspace
            that another conversion left.
    """
    found = open_source(source, text_only, ignore_unknown)
    formats = target_formats(found, weights)
    jobs = plan(found, formats, weights)
    identity = _identity(found, weights, text_only)
    total = sum(job.nbytes for job in jobs)
    if _is_made(Path(output), _metadata(found, formats, identity, {})):
        return Report(_count(found), total, len(found.left_out), total, notes=found.notes)
    with Resumable(Path(output)) as workspace:
        _check_same(workspace, identity)
        if not workspace.note:
            workspace.begin(sum(_written(job) for job in jobs))
        with writable(workspace.output), Writer(workspace.path, synced=False) as writer:
            done = _done(workspace, jobs, writer, lambda done: progress(done, total))
            workspace.write_note({"identity": identity, "boot": boot(), "done": done})
            resumed = sum(job.nbytes for job in jobs if job.name in done)
            _work(jobs, writer, workspace, lambda done: progress(done, total))
            errors = _sum(workspace.note["done"][job.name] for job in jobs)
            names = [name for job in jobs for name in job.arrays]
            writer.finish(names, KEY, _metadata(found, formats, identity, errors))
            copy_companions(Path(source), workspace.path / RESULT)
        workspace.finish()
    return Report(_count(found), total, len(found.left_out), resumed, errors, found.notes)


def _is_made(output: Path, metadata: dict[str, Any]) -> bool:
    """Whether a conversion that gives such metadata has been made there."""
    if not is_finished(output):
        return False
    theirs = open_finished(output, KEY, REMEDY).metadata
    conversion = theirs.get("conversion")
    if not isinstance(conversion, dict):
        return False
    ours = json.loads(json.dumps(metadata))
    return theirs | {"conversion": conversion | {"errors": {}}, "version": ours["version"]} == ours


def _check_same(workspace: Resumable, identity: dict[str, Any]) -> None:
    """Raises a UserError if another conversion was interrupted."""
    if workspace.note and workspace.note.get("identity") != identity:
        raise UserError(
            f"{workspace.path} is left from a conversion of another source, by another "
            "version or with other flags; delete it and run again."
        )


def _done(
    workspace: Resumable, jobs: list[Job], writer: Writer, progress: Callable[[int], None]
) -> dict[str, dict[str, Error]]:
    """Names of the jobs that an interrupted run finished, and what quantizing lost in each.

    What was written in an earlier life of the system may be lost, and is read to be sure.
    """
    noted = workspace.note.get("done", {})
    believed = bool(boot()) and workspace.note.get("boot") == boot()
    done: dict[str, dict[str, Error]] = {}
    count = 0
    for job in jobs:
        if job.name in noted and (believed or _is_intact(job, writer)):
            done[job.name] = {kind: Error(*error) for kind, error in noted[job.name].items()}
            count += job.nbytes
            if not believed:  # which takes a while
                progress(count)
    return done


def _is_intact(job: Job, writer: Writer) -> bool:
    try:
        for name in job.arrays:
            writer.reopen(name).check()
    except UserError:
        return False
    return True


def _work(
    jobs: list[Job], writer: Writer, workspace: Resumable, progress: Callable[[int], None]
) -> None:
    """Does the jobs that are not noted yet, and notes each."""
    done = dict(workspace.note["done"])
    count = sum(job.nbytes for job in jobs if job.name in done)
    progress(count)
    for job in jobs:
        if job.name in done:
            continue
        lost: dict[str, Error] = {}
        for step in _write(job, writer):
            count += step.nbytes
            progress(count)
            if step.error is not None:
                lost = _sum([lost, {_kind(step.blocks[0][0]): step.error}])
        done[job.name] = lost
        workspace.write_note(workspace.note | {"done": done})


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
    return [file | {SAMPLE: _sample(folder / file["name"])} for file in found.files.files]


def _sample(file: Path) -> str:
    """Of the ends and the middle: headers of two models of one shape are equal."""
    digest, size = hashlib.sha256(), file.stat().st_size
    with open(file, "rb") as stream:
        for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
            stream.seek(start)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _written(job: Job) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in job.arrays.values())


def _count(found: Source) -> int:
    return len(found.in_files)


def _kind(array: str) -> str:
    """What an array is, in whatever layer."""
    return re.sub(r"^layers\.\d+\.|\.(qvalue|scale)$", "", array)


def _sum(errors: Iterable[Mapping[str, Error]]) -> dict[str, Error]:
    """Together, by kind of array."""
    total: dict[str, Error] = {}
    for each in errors:
        for kind, error in each.items():
            total[kind] = total[kind].plus(error) if kind in total else error
    return total


def _write(job: Job, writer: Writer) -> Iterator[Step]:
    """Makes a job's arrays; yields each step; at the end all is in its files."""
    arrays = {name: writer.create(name, *array) for name, array in job.arrays.items()}
    for step in job.steps():
        writer.write([(arrays[name], index, data) for name, index, data in step.blocks])
        yield step
    writer.wait()


def result_dtype(found: Source, weights: str | None) -> str:
    """What the result as a whole is in; widened matrices are most of it."""
    return (
        np.dtype(FLOATS[weights]).name if found.formats and weights in FLOATS else found.main_dtype
    )


def _metadata(found: Source, formats, identity: dict[str, Any], errors) -> dict[str, Any]:
    conversion = {key: identity[key] for key in ("sources", "weights", "text_only")}
    made = model_metadata(
        found.config, result_dtype(found, identity["weights"]), formats, found.outer
    )
    return made | {"conversion": conversion | {"errors": errors}}
