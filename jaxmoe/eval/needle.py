"""A needle in a haystack: a pass key hidden at a given depth of a long context, and its score.

A context is a begin-of-text token, filler with one sentence in it that says a number, and a
question at its end. All places and lengths are in tokens.
"""

import dataclasses
import re

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.text import Tokenizer

HAYSTACK = (  # neutral, without digits, and without the words that the needle is known by
    " The river runs past the old mill. A cart waits by the gate. Bread is made before dawn."
    " Some birds sit on the wall. The wind is cold and the sky is grey. People walk to the market"
    " and back again. Apples are green, then red. A boat is moored under the bridge."
)
NEEDLE = " The pass key is {key}."
QUESTION = " What is the pass key? The pass key is"
ANSWER = " {key}."


@dataclasses.dataclass(frozen=True)
class Needle:
    """One context with its question.

    Attributes:
        prompt: the context; `len(prompt) + room` is the length that was asked for.
        key: the digits that the answer must hold.
        start: the index of the needle's first token in the prompt.
        room: tokens that the answer may take.
    """

    prompt: tuple[int, ...]
    key: str
    start: int
    room: int


def make_needle(
    tokenizer: Tokenizer, haystack: np.ndarray, key: str, length: int, depth: float
) -> Needle:
    """Hides `key` in a context.

    The answer's room is part of the length, as it is part of what a model's context holds.

    Args:
        haystack: tokens of the filler, repeated as often as it takes.
        key: digits.
        length: tokens of the prompt and the answer together.
        depth: 0 puts the needle first, 1 last; in between, that part of the filler precedes it.

    Raises:
        UserError: if the length leaves no room for any filler.
    """
    needle, question, answer = (
        tokenizer.encode(text.format(key=key)) for text in (NEEDLE, QUESTION, ANSWER)
    )
    begin = tokenizer.encode("", bos=True)
    fixed = sum(map(len, (begin, needle, question, answer)))
    filler = length - fixed
    if filler < 1:
        raise UserError(
            f"a context of {length} tokens is too short: the needle, the question and the answer "
            f"take {fixed}; ask for more."
        )
    before = round(depth * filler)
    hay = np.resize(haystack, filler).tolist()
    prompt = (*begin, *hay[:before], *needle, *hay[before:], *question)
    return Needle(prompt, key, len(begin) + before, len(answer))


def is_found(key: str, answer: str) -> bool:
    """Whether the answer holds exactly these digits, not as part of a longer number."""
    return re.search(rf"(?<!\d){key}(?!\d)", answer) is not None


def random_key(rng: np.random.Generator, digits: int) -> str:
    """Digits, of which the first is not 0."""
    first, *rest = rng.integers((1, *(digits - 1) * (0,)), 10)
    return "".join(map(str, (first, *rest)))
