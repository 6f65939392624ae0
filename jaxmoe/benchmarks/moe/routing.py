"""The routings of `jaxmoe benchmark moe`: which expert each token chooses."""

import functools

import numpy as np


@functools.cache
def experts_of(routing: str, tokens: int, experts: int) -> np.ndarray:
    """The expert of each token, [tokens], in a random order that is the same in every run.

    Args:
        routing: "random" for independent uniform choices, or as of `group_sizes`.
        tokens: how many tokens there are.
        experts: how many experts there are.
    """
    rng = np.random.default_rng(0)
    if routing == "random":
        return rng.integers(0, experts, tokens, dtype=np.int32)
    sizes = group_sizes(routing, tokens, experts)
    by_popularity = rng.permutation(experts).astype(np.int32)
    return rng.permutation(np.repeat(by_popularity, sizes))


def group_sizes(routing: str, tokens: int, experts: int) -> np.ndarray:
    """How many tokens choose each expert, [experts], largest first.

    Args:
        routing: "balanced"; "skewed", in which the nth expert gets 1/n of the first's tokens; or
            "worst", in which all tokens choose one expert.
        tokens: how many tokens there are.
        experts: how many experts there are.
    """
    popularity = {
        "balanced": np.ones(experts),
        "skewed": 1 / np.arange(1, experts + 1),  # Zipf's law
        "worst": np.arange(experts) == 0,
    }[routing]
    exact = tokens * popularity / popularity.sum()
    sizes = np.floor(exact).astype(int)
    # The tokens that are left go to the largest remainders.
    rest = np.argsort(sizes - exact, kind="stable")[: tokens - sizes.sum()]
    sizes[rest] += 1
    return sizes
