"""Rows of tokens. Which rows a step sees follows from the seed and the step alone."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmoe.errors import UserError


class Batch(NamedTuple):
    """Rows for `losses`: int32 [rows, length] each. Segment 0 is padding."""

    tokens: np.ndarray
    segment_ids: np.ndarray


def read_tokens(path: str | Path) -> np.ndarray:
    """The token ids of an `.npy` file, one after the other; not read into memory at once.

    Raises:
        UserError: if it is no such file.
    """
    try:
        tokens = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as .npy: {error}.") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UserError(f"{path} holds {tokens.dtype} {tokens.shape}, not integers [tokens].")
    return tokens


def is_held_out(document: int, every: int) -> bool:
    """Whether a document, counted from 0, is held out: the last of each `every`; 0 means none."""
    return every > 0 and document % every == every - 1


def split(tokens: np.ndarray, begin_id: int, every: int) -> tuple[np.ndarray, np.ndarray]:
    """The training part and the held-out part, by whole documents.

    Args:
        tokens: documents one after the other, each beginning with `begin_id`.
        begin_id: the begin-of-text token.
        every: see `is_held_out`.
    """
    document = np.cumsum(tokens == begin_id) - 1
    held_out = (document % every == every - 1) if every else np.zeros(len(tokens), bool)
    return tokens[~held_out], tokens[held_out]


def training_batch(
    tokens: np.ndarray, begin_id: int, *, length: int, rows: int, seed: int, step: int
) -> Batch:
    """The rows of one step. Each epoch cuts the text at other places and shuffles the rows.

    Raises:
        UserError: if there are too few tokens for two rows.
    """
    count = len(tokens) // length - 1  # the cuts of an epoch shift by up to one row
    if count < 1:
        raise UserError(f"{len(tokens)} training tokens are too few for rows of {length} tokens.")
    indices = np.arange(step * rows, (step + 1) * rows)
    starts = [_row_start(seed, *divmod(int(index), count), count, length) for index in indices]
    return _batch(np.stack([tokens[start : start + length] for start in starts]), begin_id)


def held_out_batches(
    tokens: np.ndarray, begin_id: int, *, length: int, rows: int
) -> Iterator[Batch]:
    """All tokens once, in order; what the last batch lacks is padding."""
    padding = -len(tokens) % (length * rows)
    padded = np.pad(tokens, (0, padding)).reshape(-1, rows, length)
    real = np.pad(np.ones(len(tokens), bool), (0, padding)).reshape(padded.shape)
    for part, is_real in zip(padded, real, strict=True):
        batch = _batch(part, begin_id)
        yield batch._replace(segment_ids=batch.segment_ids * is_real)


def _row_start(seed: int, epoch: int, index: int, count: int, length: int) -> int:
    shift, order = _epoch(seed, epoch, count, length)
    return shift + int(order[index]) * length


@functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
def _epoch(seed: int, epoch: int, count: int, length: int) -> tuple[int, np.ndarray]:
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(length)), rng.permutation(count)


def _batch(tokens: np.ndarray, begin_id: int) -> Batch:
    """Segments begin at every document's first token; the first may lack its beginning."""
    segment_ids = 1 + np.cumsum(tokens == begin_id, axis=1)
    return Batch(tokens.astype(np.int32), segment_ids.astype(np.int32))
