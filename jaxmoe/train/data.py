"""Rows of tokens. Which rows a step sees follows from the seed and the step alone."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from jaxmoe.errors import UserError

NPY, ZIP = b"\x93NUMPY", b"PK"  # how such files begin
BLOCK = 2**24  # tokens looked at once


class Batch(NamedTuple):
    """Rows for `losses`: int32 [rows, length] each, and which tokens are learned; None means all.

    Segment 0 is padding. `source` is which of several sources each token is of; None of one.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    learned: np.ndarray | None = None
    source: np.ndarray | None = None


def read_tokens(path: str | Path, dtype: str | None = None) -> Integer[np.ndarray, "tokens"]:
    """The token ids of a file, one after the other; not read into memory at once.

    Args:
        path: an `.npy` file, or raw numbers.
        dtype: of raw numbers; an `.npy` file names its own.

    Raises:
        UserError: if it is no such file, or holds nothing.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(NPY))
        tokens = _read_npy(path, dtype) if start == NPY else _read_raw(path, dtype, start)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UserError(f"{path} holds {tokens.dtype} {tokens.shape}, not integers [tokens].")
    if not len(tokens):
        raise UserError(f"{path} holds no tokens.")
    return tokens


def _read_npy(path: str | Path, dtype: str | None) -> np.ndarray:
    if dtype is not None:
        raise UserError(f"{path} is an .npy file, which names its own dtype; leave out 'dtype'.")
    try:
        tokens: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy parses the header as Python, which may raise anything
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is a damaged .npy file: {reason:.200}; make it again.") from None
    if tokens.offset + tokens.nbytes != os.path.getsize(path):
        raise UserError(f"{path} is longer than its header says; make it again.")
    return tokens


def _read_raw(path: str | Path, dtype: str | None, start: bytes) -> np.ndarray:
    if dtype is None:
        what = "is an .npz archive" if start.startswith(ZIP) else "is no .npy file"
        raise UserError(
            f"{path} {what}; write its tokens with numpy.save, or give the 'dtype' of raw numbers, "
            "such as uint16 for nanoGPT's .bin files."
        )
    nbytes = os.path.getsize(path)
    if not nbytes or nbytes % np.dtype(dtype).itemsize:
        raise UserError(f"{path} has {nbytes} bytes, which are no tokens of {dtype}.")
    return np.memmap(path, dtype, mode="r")


def check_tokens(tokens: Integer[np.ndarray, "tokens"], vocab_size: int, path: str | Path) -> None:
    """Checks that every token is in the vocabulary.

    Raises:
        UserError: naming the first that is not, and its place.
    """
    for start in range(0, len(tokens), BLOCK):
        block = tokens[start : start + BLOCK]
        bad = np.flatnonzero((block < 0) | (block >= vocab_size))
        if len(bad):
            raise UserError(
                f"{path} holds {block[bad[0]]} at index {start + bad[0]}, but the model's tokens "
                f"are 0 to {vocab_size - 1}; make the file with the model's tokenizer"
                + (", without marks such as -100." if block[bad[0]] < 0 else ".")
            )


def is_held_out(document: Any, every: int) -> Any:
    """Whether a document, counted from 0, is held out: the last of each `every`; 0 means none.

    Args:
        document: one number, or an array of them.
    """
    return document % every == every - 1 if every else document < 0


def split(
    tokens: Integer[np.ndarray, "tokens"], begin_id: int, every: int
) -> tuple[Integer[np.ndarray, "training"], Integer[np.ndarray, "held_out"]]:
    """The training part and the held-out part, by whole documents.

    Args:
        tokens: documents one after the other, all but perhaps the first beginning with `begin_id`.
        begin_id: the begin-of-text token.
        every: see `is_held_out`.
    """
    if not every:
        return tokens, tokens[:0]
    begins = tokens == begin_id
    held_out = is_held_out(np.cumsum(begins) - int(begins[0]), every)
    return tokens[~held_out], tokens[held_out]


def check_documents(
    tokens: Integer[np.ndarray, "tokens"], begin_id: int, every: int, path: str | Path
) -> None:
    """Raises a UserError if there are too few documents for `every` to hold one out."""
    count = 1 + np.count_nonzero(tokens[1:] == begin_id) if every else 0
    if count < every:
        raise UserError(
            f"held_out_every is {every}, but {path} has {count} document(s), each of which begins "
            f"with the model's bos_token_id, {begin_id}; put that before each, or hold out none."
        )


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
    """Rows whose segments are documents; a row's first document may lack its beginning."""
    segment_ids = 1 + np.cumsum(tokens == begin_id, axis=1)
    return Batch(tokens.astype(np.int32), segment_ids.astype(np.int32))
