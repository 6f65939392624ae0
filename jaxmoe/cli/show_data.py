"""Prints examples of what a run trains on, with what the loss counts in colour."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int
from rich.console import Console
from rich.text import Text

from jaxmoe.text import Tokenizer
from jaxmoe.train.batches import TrainingData
from jaxmoe.train.documents import SKIPPED
from jaxmoe.train.run_folder import DATA

LEARNED, GIVEN = "bold green", "dim"


def show_examples(data: TrainingData, tokenizer: Tokenizer, count: int, console: Console) -> None:
    """Prints the first documents of a run.

    Where there are no colours, what the loss counts is in double brackets.

    Args:
        data: of the run.
        tokenizer: of the model.
        count: how many documents.
        console: to print to.
    """
    for number, (tokens, learned) in zip(range(count), _examples(data), strict=False):
        console.print(f"Example {number + 1}, of which the loss counts {learned.sum():,} tokens:")
        console.print(_coloured(tokens, learned, tokenizer, console.is_terminal))


def _examples(data: TrainingData) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The documents of a run in their order, and which of their tokens are targets."""
    for step in itertools.count():
        tokens, segment_ids, learned = data.batches(step)[:3]
        learned = np.ones(tokens.shape, bool) if learned is None else learned
        for row in zip(tokens, segment_ids, learned, strict=True):
            yield from _segments(*row)


def _segments(
    tokens: Int[np.ndarray, "length"],
    segment_ids: Int[np.ndarray, "length"],
    learned: Bool[np.ndarray, "length"],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The segments of a row; the first token of each is no target, since nothing predicts it."""
    for part in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(segment_ids)) + 1):
        if segment_ids[part[0]]:
            yield tokens[part], learned[part] & (part > part[0])


def _coloured(
    tokens: Int[np.ndarray, "tokens"],
    learned: Bool[np.ndarray, "tokens"],
    tokenizer: Tokenizer,
    in_colour: bool,
) -> Text:
    """The text of tokens, those of the loss in another style; a tile's features as one word."""
    text = Text()
    kind = np.where(tokens < tokenizer.vocab_size, learned.astype(int), -1)
    for part in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(kind)) + 1):
        words = tokenizer.decode(tokens[part].tolist(), skip_special=False)
        match kind[part[0]]:
            case -1:
                text.append("<picture>", GIVEN)
            case 0:
                text.append(words, GIVEN)
            case _:
                text.append(words if in_colour else f"[[{words}]]", LEARNED)
    return text


def skipped_rows(folder: Path, count: int) -> str:
    """A sentence on the rows that a run could not use.

    Args:
        folder: of the run.
        count: how many there are.
    """
    listed = folder / DATA / SKIPPED
    with open(listed) as file:
        first = json.loads(file.readline())["error"]
    return f"Skipped {count:,} row(s) that {listed} lists, such as {first}"
