"""Training rows of the needle model; a step's rows follow from the seed and the step alone."""

from typing import NamedTuple

import numpy as np

from jaxmoe.eval.needle import ANSWER, HAYSTACK, NEEDLE, QUESTION, random_key
from jaxmoe.text import Tokenizer

DIGITS = 5
APART = 0.7  # of the rows have the needle in another chunk than the question, as long contexts do
ANYWHERE = 0.15  # have the end of a chunk anywhere, also within the needle or the answer
LONGEST = 262144  # positions of training rows lie anywhere below, or the temperature is unknown
GAPS = 8  # at most so many jumps between positions of filler, and of this many tokens in all:
SPREAD = 16384  # local layers meet every distance that they will meet in long contexts
SHARED = ("pass", "key")  # words that filler never holds


class Rows(NamedTuple):
    """Rows of one step, int32 [rows, length] each."""

    tokens: np.ndarray
    positions: np.ndarray
    answer: np.ndarray  # 1 from the question's last token to the end of the text, else 0


class Task:
    """The tokens that contexts are made of."""

    def __init__(self, tokenizer: Tokenizer, chunk: int):
        self.tokenizer = tokenizer
        self.chunk = chunk
        self.begin = tokenizer.bos_id
        self.end = tokenizer.special("<|end_of_text|>")
        self.haystack = np.array(tokenizer.encode(HAYSTACK))
        kept_back = {*tokenizer.encode(" " + " ".join(SHARED) + " 0123456789")}
        ordinary = range(tokenizer.vocab_size - len(tokenizer.specials))
        self.words = np.array([token for token in ordinary if token not in kept_back])

    def rows(self, seed: int, step: int, rows: int, length: int) -> Rows:
        """The rows of one step."""
        rng = np.random.default_rng((seed, step))
        return Rows(
            *map(np.stack, zip(*(self._row(rng, length) for _ in range(rows)), strict=True))
        )

    def _row(self, rng: np.random.Generator, length: int) -> Rows:
        key = random_key(rng, DIGITS)
        needle, question, answer = (
            self.tokenizer.encode(text.format(key=key)) for text in (NEEDLE, QUESTION, ANSWER)
        )
        answer = [*answer, self.end]
        hay = self._filler(rng, length - 1 - len(needle) - len(question) - len(answer))
        before = int(rng.integers(len(hay) + 1))
        tokens = [self.begin, *hay[:before], *needle, *hay[before:], *question, *answer]
        asked = length - len(question) - len(answer)
        told = 1 + before + len(needle)
        positions = self._positions(rng, length, (1 + before, told, asked))
        is_answer = np.arange(length) >= length - len(answer) - 1
        return Rows(*(np.asarray(x, np.int32) for x in (tokens, positions, is_answer)))

    def _filler(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Half of the time the haystack from anywhere in it, else any words at random."""
        if rng.random() < 0.5:
            return np.resize(np.roll(self.haystack, rng.integers(len(self.haystack))), count)
        return rng.choice(self.words, count)

    def _positions(
        self, rng: np.random.Generator, length: int, marks: tuple[int, int, int]
    ) -> np.ndarray:
        """Where the tokens of a row lie; mostly a chunk ends between needle and question.

        Args:
            marks: the indices of the needle's first token, of the one after it, of the question.
        """
        begin, told, asked = marks
        places = np.r_[1 : begin + 1, told : asked + 1]
        order = np.arange(length) + _gaps(rng, length, places)
        kind, last = rng.random(), LONGEST - int(order[-1]) - 1
        if kind > APART + ANYWHERE:
            return order + (int(rng.integers(last + 1)) if rng.random() < 0.5 else 0)
        low, high = (order[told], order[asked]) if kind < APART else (1, order[-1])
        first_of_chunk = int(rng.integers(low, high + 1))
        earlier = -(-first_of_chunk // self.chunk)
        return order - first_of_chunk + self.chunk * int(rng.integers(earlier, last // self.chunk))


def _gaps(rng: np.random.Generator, length: int, places: np.ndarray) -> np.ndarray:
    """How far each token is moved: nothing in every fourth row, and never within a sentence."""
    jumps = np.zeros(length, np.int64)
    if rng.random() < 0.75:
        where = rng.choice(places, rng.integers(1, GAPS + 1))
        total = np.exp(rng.uniform(0, np.log(SPREAD)))
        np.add.at(jumps, where, (rng.dirichlet(np.ones(len(where))) * total).astype(int))
    return np.cumsum(jumps)
