"""What prompts begin with in common, against a search through all of them."""

import itertools

import numpy as np

from jaxmoe.generation.prefixes import DEEPEST, SHORTEST, find_prefixes
from jaxmoe.generation.request import Request


def prompts_of(rng):
    """A tree of stems of up to 150 tokens, and prompts that end somewhere beyond them."""
    stems = [()]
    for _ in range(rng.integers(1, 6)):
        stems.append(stems[rng.integers(len(stems))] + draw(rng, rng.integers(1, 150)))
    return [stems[rng.integers(len(stems))] + draw(rng, rng.integers(1, 9)) for _ in range(12)]


def draw(rng, count):
    return tuple(rng.integers(0, 2, count).tolist())


def common(a, b):
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a[:-1], b[:-1], strict=False))
    return sum(1 for _ in pairs)


def test_prefixes_are_what_prompts_share():
    rng, found_some = np.random.default_rng(0), 0
    for _ in range(300):
        prompts = prompts_of(rng)
        found = find_prefixes([Request(i, prompt, 1) for i, prompt in enumerate(prompts)])
        users = {}
        for prompt, prefix in zip(prompts, found, strict=True):
            for part in prefix.path if prefix else ():
                users.setdefault(part, []).append(prompt)
                assert prompt[: len(part.tokens)] == part.tokens and len(part.tokens) < len(prompt)
        for prefix, mine in users.items():
            assert len(mine) == prefix.waiting > 1
            assert len(prefix.tokens) == min(
                common(a, b) for a, b in itertools.combinations(mine, 2)
            )
            begin = len(prefix.parent.tokens) if prefix.parent else 0
            assert len(prefix.tokens) >= begin + SHORTEST and len(prefix.path) <= DEEPEST
        for (a, x), (b, y) in itertools.combinations(zip(prompts, found, strict=True), 2):
            if common(a, b) >= SHORTEST:  # some prefix serves both
                assert x and y and set(x.path) & set(y.path)
        found_some += len(users)
    assert found_some > 300
