"""Requests as `jaxmoe benchmark engine` runs them: random tokens, and lengths by seed 0."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jaxmoe.generation.request import Request
from jaxmoe.generation.sampling import Sampling

SEED = 0
PREFIX = 2000  # tokens that all prompts of "prefixes" begin with

Prompt = tuple[list[int], int]  # its tokens, and how many to answer with


class Workload(NamedTuple):
    """A kind of requests.

    Attributes:
        draw: yields prompts without end, given random numbers and the size of the vocabulary.
        count: how many of them are run by default.
    """

    draw: Callable[[np.random.Generator, int], Iterator[Prompt]]
    count: int


def requests_of(workload: str, vocab_size: int, count: int | None = None) -> list[Request]:
    """The first requests of a workload, answered greedily; the same ones at every call.

    Args:
        workload: a name of `WORKLOADS`.
        vocab_size: tokens are drawn from all of it.
        count: default: the workload's own.
    """
    drawn = WORKLOADS[workload].draw(np.random.default_rng(SEED), vocab_size)
    numbers = range(WORKLOADS[workload].count if count is None else count)
    return [
        Request(i, tuple(tokens), answer, Sampling(temperature=0.0))
        for i, (tokens, answer) in zip(numbers, drawn, strict=False)
    ]


def _lognormal(rng: np.random.Generator, vocab_size: int) -> Iterator[Prompt]:
    """Prompts and answers as people's are: most are short, some are long."""
    while True:
        prompt = int(np.clip(rng.lognormal(4.6, 1.0), 4, 1500))
        answer = int(np.clip(rng.lognormal(4.0, 0.8), 4, 400))
        yield rng.integers(0, vocab_size, prompt).tolist(), answer


def _prefixes(rng: np.random.Generator, vocab_size: int) -> Iterator[Prompt]:
    """Short questions behind one long prefix."""
    prefix = rng.integers(0, vocab_size, PREFIX).tolist()
    while True:
        own, answer = int(rng.integers(8, 61)), int(rng.integers(16, 65))
        yield prefix + rng.integers(0, vocab_size, own).tolist(), answer


def _long(rng: np.random.Generator, vocab_size: int) -> Iterator[Prompt]:
    """Long prompts and a few words of answer."""
    while True:
        prompt, answer = int(rng.integers(1000, 3001)), int(rng.integers(1, 17))
        yield rng.integers(0, vocab_size, prompt).tolist(), answer


WORKLOADS = {
    "lognormal": Workload(_lognormal, 64),
    "prefixes": Workload(_prefixes, 100),
    "long": Workload(_long, 16),
}
