"""Compares a converted checkpoint with its source, byte by byte."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checkpoint.convert.conversion import SAMPLE, Report, result_dtype
from jaxmoe.checkpoint.convert.recode import WEIGHTS, Job, plan, target_formats
from jaxmoe.checkpoint.convert.source import Source, open_source
from jaxmoe.checkpoint.store import KEY, REMEDY, Progress, model_metadata, no_progress
from jaxmoe.checkpoint.zarr.manifest import Finished, open_finished
from jaxmoe.errors import UserError


def verify(source: str | Path, checkpoint: str | Path, progress: Progress = no_progress) -> Report:
    """Reads a source and the checkpoint made from it, and compares every byte.

    Args:
        source: the folder that was converted.
        checkpoint: the checkpoint's folder.
        progress: called after every block with the bytes done and the bytes in all.

    Returns:
        What was compared.

    Raises:
        UserError: naming the first array that differs; or if the checkpoint was not made from this
            source, or the ranks of a Meta source differ in a tensor that every rank stores.
    """
    finished = open_finished(Path(checkpoint), KEY, REMEDY)
    made_from, weights, text_only = _conversion(finished)
    opened = open_source(source, text_only, ignore_unknown=True)  # configurations are compared
    if made_from != opened.files.files:
        raise UserError(f"{checkpoint} was made of other files than those in {source}.")
    made = model_metadata(opened.config, result_dtype(opened, weights))
    if finished.metadata.get("config") != json.loads(json.dumps(made["config"])):
        raise UserError(f"{checkpoint} has another configuration than {source}; convert it again.")
    _check_copies(opened)
    jobs = plan(opened, target_formats(opened, weights), weights)
    total, count = sum(job.nbytes for job in jobs), 0
    for job in jobs:
        for nbytes in _compare(job, finished):
            count += nbytes
            progress(count, total)
    return Report(len(opened.stored_names), total, len(opened.left_out), notes=opened.notes)


def _conversion(finished: Finished) -> tuple[list[dict[str, Any]], str | None, bool]:
    """What a checkpoint was made from: the files, `weights` and `text_only`, as `convert` has them.

    Raises:
        UserError: if its metadata do not say.
    """
    match finished.metadata.get("conversion", {"sources": []}):
        case {"sources": list(sources), **options} if all(isinstance(x, dict) for x in sources):
            weights, text_only = options.get("weights"), options.get("text_only", False)
            made_from = [{key: file[key] for key in file if key != SAMPLE} for file in sources]
            if (weights is None or weights in WEIGHTS) and isinstance(text_only, bool):
                return made_from, weights, text_only
    raise UserError(f"{finished.path} does not say what it was made of; convert it again.")


def _compare(job: Job, checkpoint: Finished) -> Iterator[int]:
    """Compares a job's arrays with those of a checkpoint; yields the bytes of each step.

    Raises:
        UserError: naming the first block that differs.
    """
    arrays = {
        name: checkpoint.open_array(name, array.shape, (array.dtype.name,))
        for name, array in job.arrays.items()
    }
    for step in job.steps():
        for name, index, data in step.blocks:
            stored = arrays[name].read(index)
            same = stored.dtype == data.dtype and stored.shape == data.shape
            if not same or stored.tobytes() != np.ascontiguousarray(data).tobytes():
                raise UserError(
                    f"{arrays[name].path} differs from its source in {_range(index)}; "
                    "convert it again."
                )
        yield step.nbytes


def _check_copies(source: Source) -> None:
    """Compares the tensors that every model-parallel rank stores whole.

    Raises:
        UserError: naming the first one that differs between two ranks.
    """
    for group in source.groups:
        if not group.copies:
            continue
        first = next(iter(group.tensors))
        size = math.prod(group.tensors[first])
        expected = source.read(first, 0, size).tobytes()
        for name in group.copies:
            if source.read(name, 0, size).tobytes() != expected:
                raise UserError(
                    f"{source.files.folder} holds {name} with other numbers than {first}; download "
                    "both files again."
                )


def _range(index: tuple[slice, ...]) -> str:
    """A slice as one would write it, such as `[0:4, :]`."""
    parts = (":" if s == slice(None) else f"{s.start}:{s.stop}" for s in index)
    return f"[{', '.join(parts)}]"
