"""Pictures of handwritten digits, and questions about them."""

import dataclasses
import functools
from typing import Any

import numpy as np
from PIL import Image

from jaxmoe.errors import UserError
from jaxmoe.train.data import is_held_out

HELD_OUT_EVERY = 5  # of so many digits the last is held out
LAYOUTS = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))  # rows and columns of digits
ONE_TILE = 0.4  # of the pictures are so small that they are one tile
QUESTIONS = {
    "read": ("What is written?", "Read the digits."),
    "largest": ("Which is the largest digit?",),
    "count": ("How many digits are there?",),
}
PAPER, INK = (160, 256), (0, 80)  # brightness
TILE = 32


@dataclasses.dataclass(frozen=True)
class Digits:
    """Handwritten digits: images [n, 8, 8] from 0, paper, to 16, ink; and which digits they are."""

    images: np.ndarray
    labels: np.ndarray


@functools.cache
def digits(held_out: bool) -> Digits:
    """The digits that scikit-learn ships: those to train on, or those held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the digits are not installed; run: .venv/bin/python -m pip install scikit-learn"
        ) from None
    loaded: Any = load_digits()
    chosen = is_held_out(np.arange(len(loaded.target)), HELD_OUT_EVERY) == held_out
    return Digits(loaded.images[chosen], loaded.target[chosen])


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A picture, and the digits in it row by row."""

    image: Image.Image
    rows: list[list[int]]

    def answer(self, kind: str) -> str:
        """The right answer to a question of `QUESTIONS`."""
        flat = [digit for row in self.rows for digit in row]
        if kind == "read":
            return "\n".join("".join(map(str, row)) for row in self.rows)
        return str({"largest": max, "count": len}[kind](flat))


def draw(
    rng: np.random.Generator, source: Digits, layout: tuple[int, int], one_tile: bool
) -> Drawing:
    """Digits in rows and columns, at drawn places of their cells, in drawn sizes and brightness."""
    rows, columns = layout
    cell = TILE // max(layout) if one_tile else TILE
    chosen = rng.integers(len(source.labels), size=layout)
    mask = np.zeros((rows * cell, columns * cell))
    for row, column in np.ndindex(layout):
        size = int(rng.integers(cell * 3 // 4, cell + 1))
        y, x = rng.integers(cell - size + 1, size=2) + cell * np.array([row, column])
        mask[y : y + size, x : x + size] = enlarged(source.images[chosen[row, column]], size)
    paper, ink = (rng.integers(*between) for between in (PAPER, INK))
    image = Image.fromarray(np.round(paper + (ink - paper) * mask).astype(np.uint8)).convert("RGB")
    return Drawing(image, source.labels[chosen].tolist())


def enlarged(image: np.ndarray, size: int) -> np.ndarray:
    """An image of 0 to 16 as [size, size] of 0 to 1."""
    grey = Image.fromarray((image * 255 / 16).astype(np.uint8))
    return np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC)) / 255


def draw_any(rng: np.random.Generator, source: Digits, layouts=LAYOUTS) -> Drawing:
    """A picture of a drawn layout."""
    layout = layouts[rng.integers(len(layouts))]
    one_tile = max(layout) < 3 and rng.random() < ONE_TILE  # three in a tile are hardly legible
    return draw(rng, source, layout, bool(one_tile))


def ask(rng: np.random.Generator, drawing: Drawing) -> list[dict]:
    """A conversation about a picture: what is written, and perhaps more, in any order."""
    others = [kind for kind in QUESTIONS if kind != "read"]
    kinds = ["read", *rng.permutation(others)[: rng.integers(3)]]
    messages = []
    for kind in rng.permutation(kinds):
        question = str(rng.choice(QUESTIONS[kind]))
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": drawing.answer(kind)})
    messages[0] = question_about(drawing.image, messages[0]["content"])
    return messages


def question_about(image: Any, text: str) -> dict:
    """A user's message with a picture before its text."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return {"role": "user", "content": content}
