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
    """Reads source and checkpoint again, and compares every byte.

    Raises:
        UserError: naming the first array that differs, or if the checkpoint was not made of this
            source, or ranks of a source differ in what all of them have.
    """
    finished = open_finished(Path(checkpoint), KEY, REMEDY)
    made_of, weights, text_only = _conversion(finished)
    found = open_source(source, text_only, ignore_unknown=True)  # configurations are compared
    if made_of != found.files.files:
        raise UserError(f"{checkpoint} was made of other files than those in {source}.")
    made = model_metadata(found.config, result_dtype(found, weights))
    if finished.metadata.get("config") != json.loads(json.dumps(made["config"])):
        raise UserError(f"{checkpoint} has another configuration than {source}; convert it again.")
    _check_copies(found)
    jobs = plan(found, target_formats(found, weights), weights)
    total, count = sum(job.nbytes for job in jobs), 0
    for job in jobs:
        for nbytes in _compare(job, finished):
            count += nbytes
            progress(count, total)
    return Report(len(found.in_files), total, len(found.left_out), notes=found.notes)


def _conversion(finished: Finished) -> tuple[list[dict[str, Any]], str | None, bool]:
    """The files that a checkpoint was made of, and the options."""
    match finished.metadata.get("conversion", {"sources": []}):
        case {"sources": list(sources), **options} if all(isinstance(x, dict) for x in sources):
            weights, text_only = options.get("weights"), options.get("text_only", False)
            made_of = [{key: file[key] for key in file if key != SAMPLE} for file in sources]
            if (weights is None or weights in WEIGHTS) and isinstance(text_only, bool):
                return made_of, weights, text_only
    raise UserError(f"{finished.path} does not say what it was made of; convert it again.")


def _compare(job: Job, checkpoint: Finished) -> Iterator[int]:
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
