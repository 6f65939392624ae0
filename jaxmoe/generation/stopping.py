"""What ends an answer besides its stop tokens and its length: texts, and repetition.

Both look at each new token only, whatever the length of the answer.
"""

from typing import NamedTuple

import numpy as np

from jaxmoe.generation.sampling import RepetitionDetection


class Match(NamedTuple):
    """A stop string that has appeared.

    Attributes:
        stop: the stop string.
        end: how many characters of the newest text come before its end.
    """

    stop: str
    end: int


class StopStrings:
    """Finds the first of several texts that is completed, as a text grows."""

    def __init__(self, stops: tuple[str, ...]):
        """Begins with an empty text.

        Args:
            stops: the texts; of those that end at the same character, the first listed counts.
        """
        self._words = [_Word(stop) for stop in stops]

    @property
    def held(self) -> int:
        """How many of the last characters may be the beginning of one of the texts."""
        return max((word.begun for word in self._words), default=0)

    def push(self, text: str, search: bool = True) -> Match | None:
        """Adds text, up to the end of the first match.

        Args:
            search: whether what is completed now counts; else it is passed over.
        """
        if not self._words:
            return None
        for end, char in enumerate(text, start=1):
            completed = [word.stop for word in self._words if word.push(char)]
            if completed and search:
                return Match(completed[0], end)
        return None


class _Word:
    """One text to look for, by the algorithm of Knuth, Morris and Pratt.

    Attributes:
        begun: how many characters of `stop`, but not all, are the last ones of the text so far; as
            many as possible.
    """

    def __init__(self, stop: str):
        self.stop, self.begun, self._borders = stop, 0, _borders(stop)

    def push(self, char: str) -> bool:
        """Adds a character; whether it completes the text."""
        self.begun = _extended(self.stop, self._borders, self.begun, char)
        if self.begun < len(self.stop):
            return False
        self.begun = self._borders[-1]
        return True


def _borders(word: str) -> list[int]:
    """For each beginning of a word, the length of its longest end that also begins the word."""
    borders = [0]
    for char in word[1:]:
        borders.append(_extended(word, borders, borders[-1], char))
    return borders


def _extended(word: str, borders: list[int], begun: int, char: str) -> int:
    """How much of a word is there after a character, if `begun` of it, not all, was before."""
    while begun and word[begun] != char:
        begun = borders[begun - 1]
    return begun + 1 if word[begun] == char else 0


class RepetitionWatch:
    """Sees when the last tokens are one pattern, `min_count` times."""

    def __init__(self, detection: RepetitionDetection):
        """Begins with no tokens."""
        sizes = np.arange(detection.min_pattern_size, detection.max_pattern_size + 1)
        self._before = sizes - 1
        self._enough = sizes * (detection.min_count - 1)
        self._agreeing = np.zeros_like(sizes)  # last tokens that equal the one a pattern before
        self._recent = np.full(detection.max_pattern_size, -1)  # the newest first

    def push(self, token: int) -> bool:
        """Adds a token; whether a pattern has come often enough with it."""
        same = self._recent[self._before] == token
        self._agreeing = np.where(same, self._agreeing + 1, 0)
        self._recent[1:] = self._recent[:-1]
        self._recent[0] = token
        return bool((self._agreeing >= self._enough).any())
