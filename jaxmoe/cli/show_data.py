"""Prints examples of what a run trains on, with what the loss counts in colour."""

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
    """Prints the first documents of a run's first rows.

    Where there are no colours, what the loss counts is in double brackets.

    Args:
        data: of the run.
        tokenizer: of the model.
        count: how many rows to begin.
        console: to print to.
    """
    for number, (tokens, learned) in zip(range(count), _examples(data), strict=False):
        console.print(f"Example {number + 1}, of which the loss counts {learned.sum():,} tokens:")
        console.print(_coloured(tokens, learned, tokenizer, console.is_terminal))


def _examples(data: TrainingData) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first segment of each row, and which of its tokens are targets."""
    step = 0
    while True:
        tokens, segment_ids, learned = data.batches(step)[:3]
        for row, ids in enumerate(segment_ids):
            mine = ids == ids[0]
            targets = mine[mine] if learned is None else learned[row][mine].copy()
            targets[0] = False  # nothing predicts it
            yield tokens[row][mine], targets
        step += 1


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
