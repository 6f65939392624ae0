"""Converts a published checkpoint to one that loads onto any mesh, in bounded memory."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checkpoint.convert.recode import FLOATS, Job, SquaredError, Step, plan, target_formats
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
    """What a conversion, a verification or an export has done.

    Attributes:
        tensors: how many tensors were read, or written by an export.
        nbytes: the bytes of these tensors.
        left_out: how many tensors of the source were not read.
        resumed: bytes that an earlier run had done already; all of them if it had finished.
        errors: what quantizing lost, by kind of parameter.
        notes: sentences about what users may not expect.
    """

    tensors: int
    nbytes: int
    left_out: int
    resumed: int = 0
    errors: Mapping[str, SquaredError] = dataclasses.field(default_factory=dict)
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

    Names, shapes, dtypes and file sizes are checked before anything is written. If it is killed and
    called again with the same arguments, it resumes, and repeats at most the tensor that was being
    read and, after a restart of the system, what the restart lost. The result is the same to the
    byte. If it had finished, it does nothing.

    Args:
        source: a folder with `config.json` and safetensors, or with Meta's `consolidated.*.pth`.
        output: the checkpoint's folder, which must not exist or be empty.
        progress: called after every block with the bytes done and the bytes in all.
        weights: "fp8", "int8" or "int4" quantizes matrices; "bf16" or "float32" widens quantized
            ones; None keeps every byte.
        text_only: leaves out the vision tower.
        ignore_unknown: ignores unknown keys of the configuration instead of refusing them.

    Returns:
        What was done.

    Raises:
        UserError: if the source is bad, the output exists, the disk is too small, or another
            conversion left its workspace beside the output.
    """
    opened = open_source(source, text_only, ignore_unknown)
    formats = target_formats(opened, weights)
    jobs = plan(opened, formats, weights)
    identity = _identity(opened, weights, text_only)
    total = sum(job.nbytes for job in jobs)
    counts = len(opened.stored_names), total, len(opened.left_out)
    if _is_made(Path(output), _metadata(opened, formats, identity, {})):
        return Report(*counts, resumed=total, notes=opened.notes)
    with Resumable(Path(output)) as workspace:
        _check_same(workspace, identity)
        if not workspace.note:
            workspace.begin(sum(array.nbytes for job in jobs for array in job.arrays.values()))
        with writable(workspace.output), Writer(workspace.path, synced=False) as writer:
            done = _done(workspace, jobs, writer, lambda done: progress(done, total))
            workspace.write_note({"identity": identity, "boot": boot(), "done": done})
            resumed = sum(job.nbytes for job in jobs if job.name in done)
            _work(jobs, writer, workspace, lambda done: progress(done, total))
            errors = _sum(workspace.note["done"][job.name] for job in jobs)
            names = [name for job in jobs for name in job.arrays]
            writer.finish(names, KEY, _metadata(opened, formats, identity, errors))
            copy_companions(Path(source), workspace.path / RESULT)
        workspace.finish()
    return Report(*counts, resumed, errors, opened.notes)


def _is_made(output: Path, metadata: dict[str, Any]) -> bool:
    """Whether `output` is a finished conversion with this metadata, by whatever version.

    Args:
        output: where the checkpoint would be.
        metadata: of the conversion, with no errors of quantizing, which are not known beforehand.
    """
    if not is_finished(output):
        return False
    existing = open_finished(output, KEY, REMEDY).metadata
    conversion = existing.get("conversion")
    if not isinstance(conversion, dict):
        return False
    wanted = json.loads(json.dumps(metadata))
    ignored = {"conversion": conversion | {"errors": {}}, "version": wanted["version"]}
    return existing | ignored == wanted


def _check_same(workspace: Resumable, identity: dict[str, Any]) -> None:
    """Raises a UserError if the workspace was left by another conversion."""
    if workspace.note and workspace.note.get("identity") != identity:
        raise UserError(
            f"{workspace.path} is left from a conversion of another source, by another "
            "version or with other flags; delete it and run again."
        )


def _done(
    workspace: Resumable, jobs: list[Job], writer: Writer, progress: Callable[[int], None]
) -> dict[str, dict[str, SquaredError]]:
    """The jobs that an interrupted run has finished: what quantizing lost in each, by job.

    Arrays are not synced before the end, so those from before a reboot may be damaged, and are read
    to verify them.
    """
    noted = workspace.note.get("done", {})
    same_boot = bool(boot()) and workspace.note.get("boot") == boot()
    done: dict[str, dict[str, SquaredError]] = {}
    count = 0
    for job in jobs:
        if job.name in noted and (same_boot or _is_intact(job, writer)):
            done[job.name] = {kind: SquaredError(*error) for kind, error in noted[job.name].items()}
            count += job.nbytes
            if not same_boot:
                progress(count)
    return done


def _is_intact(job: Job, writer: Writer) -> bool:
    """Whether all of a job's arrays have the checksums with which they were written."""
    try:
        for name in job.arrays:
            writer.reopen(name).check()
    except UserError:
        return False
    return True


def _work(
    jobs: list[Job], writer: Writer, workspace: Resumable, progress: Callable[[int], None]
) -> None:
    """Does the jobs that the workspace's note does not list, and adds each to the note."""
    done = dict(workspace.note["done"])
    count = sum(job.nbytes for job in jobs if job.name in done)
    progress(count)
    for job in jobs:
        if job.name in done:
            continue
        lost: dict[str, SquaredError] = {}
        for step in write_job(job, writer):
            count += step.nbytes
            progress(count)
            if step.error is not None:
                lost = _sum([lost, {_kind(step.blocks[0][0]): step.error}])
        done[job.name] = lost
        workspace.write_note(workspace.note | {"done": done})


def _identity(source: Source, weights: str | None, text_only: bool) -> dict[str, Any]:
    """What a resumed conversion must have in common with the interrupted one."""
    metadata = model_metadata(source.config, "bfloat16")
    return {
        "version": metadata["version"],
        "config": metadata["config"],
        "sources": _sources(source),
        "weights": weights,
        "text_only": text_only,
    }


def _sources(source: Source) -> list[dict[str, Any]]:
    """What tells the source's files from other files; only samples of their data are read."""
    folder = source.files.folder
    return [file | {SAMPLE: _sample(folder / file["name"])} for file in source.files.files]


def _sample(file: Path) -> str:
    """The SHA-256 of a file's two ends and its middle.

    The header alone would not tell apart two models of the same shapes.
    """
    digest, size = hashlib.sha256(), file.stat().st_size
    with open(file, "rb") as stream:
        for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
            stream.seek(start)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _kind(array: str) -> str:
    """An array's kind: the name of its parameter without the layer."""
    return re.sub(r"^layers\.\d+\.|\.(qvalue|scale)$", "", array)


def _sum(errors: Iterable[Mapping[str, SquaredError]]) -> dict[str, SquaredError]:
    """The errors of several jobs or steps together, by kind of parameter."""
    total: dict[str, SquaredError] = {}
    for by_kind in errors:
        for kind, error in by_kind.items():
            total[kind] = total[kind].plus(error) if kind in total else error
    return total


def write_job(job: Job, writer: Writer) -> Iterator[Step]:
    """Makes a job's arrays, and yields each step once it is being written.

    At the end all arrays are in their files.
    """
    arrays = {name: writer.create(name, *array) for name, array in job.arrays.items()}
    for step in job.steps():
        writer.write([(arrays[name], index, data) for name, index, data in step.blocks])
        yield step
    writer.wait()


def result_dtype(source: Source, weights: str | None) -> str:
    """The dtype that the result as a whole counts as.

    If quantized matrices were widened, it is theirs, since they are most of the model.
    """
    if weights in FLOATS and source.formats:
        return np.dtype(FLOATS[weights]).name
    return source.main_dtype


def _metadata(source: Source, formats, identity: dict[str, Any], errors) -> dict[str, Any]:
    """The custom metadata of the converted checkpoint."""
    conversion = {key: identity[key] for key in ("sources", "weights", "text_only")}
    dtype = result_dtype(source, identity["weights"])
    metadata = model_metadata(source.config, dtype, formats, source.outer)
    return metadata | {"conversion": conversion | {"errors": errors}}
