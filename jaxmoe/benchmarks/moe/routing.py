"""Which expert each token chooses in `jaxmoe benchmark moe`."""

import functools

import numpy as np


@functools.cache
def experts_of(routing: str, tokens: int, experts: int) -> np.ndarray:
    """The expert of each token, in an order that is random and always the same."""
    rng = np.random.default_rng(0)
    if routing == "random":
        return rng.integers(0, experts, tokens, dtype=np.int32)
    sizes = group_sizes(routing, tokens, experts)
    names = rng.permutation(experts).astype(np.int32)  # the popular ones are not the first
    return rng.permutation(np.repeat(names, sizes))


def group_sizes(routing: str, tokens: int, experts: int) -> np.ndarray:
    """How many tokens choose each expert, largest first."""
    popularity = {
        "balanced": np.ones(experts),
        "skewed": 1 / np.arange(1, experts + 1),  # Zipf
        "worst": np.arange(experts) == 0,
    }[routing]
    exact = tokens * popularity / popularity.sum()
    sizes = np.floor(exact).astype(int)
    rest = np.argsort(sizes - exact, kind="stable")[: tokens - sizes.sum()]  # largest remainders
    sizes[rest] += 1
    return sizes
