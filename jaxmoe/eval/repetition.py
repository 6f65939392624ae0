"""How much of a sequence repeats itself: n-grams seen before, and the loop that it ends in."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np


class Loop(NamedTuple):
    """The repetition that a sequence ends in.

    Attributes:
        repeated: length of the longest suffix that also occurs earlier, overlaps included.
        period: the distance at which the longest periodic suffix repeats; 0 if there is none.
        length: of that suffix, two periods or more; 0 if there is none.
    """

    repeated: int
    period: int
    length: int


def seen_fraction(tokens: Sequence[Hashable], n: int) -> float | None:
    """The fraction of n-grams that occurred earlier in the sequence; None if it holds none."""
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else None


def find_loop(tokens: Sequence[int]) -> Loop:
    """The longest repeated suffix and the longest periodic one; of equal ones the least period."""
    ids = np.asarray(tokens)
    runs = [(_agreeing_end(ids, period), period) for period in range(1, len(ids))]
    periodic = [(run + period, -period) for run, period in runs if run >= period]
    length, negative = max(periodic, default=(0, 0))
    return Loop(max((run for run, _ in runs), default=0), -negative, length)


def _agreeing_end(ids: np.ndarray, shift: int) -> int:
    """How many last tokens each equal the one `shift` places before it."""
    differs = ids[shift:] != ids[:-shift]
    return int(np.argmax(differs[::-1])) if differs.any() else len(differs)
