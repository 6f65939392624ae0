"""Which prompts begin alike: a tree of prefixes, each of which is read once for all its users."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from jaxmoe.generation.request import Request

SHORTEST = 64  # tokens that a prefix has beyond the one it begins with, at least
DEEPEST = 3  # prefixes one after the other; each takes a row of the cache while it is in use


@dataclasses.dataclass(eq=False)
class Prefix:
    """The first tokens of several prompts.

    Attributes:
        adapter: the name of the adapter that its keys and values are computed with.
        parent: a shorter prefix that this one begins with.
        waiting: requests that go on from here, or from a longer one, and have not begun.
    """

    tokens: tuple[int, ...]
    parent: "Prefix | None"
    waiting: int = 0
    adapter: str | None = None

    @property
    def path(self) -> list["Prefix"]:
        """The prefix itself, and all that it begins with."""
        return [self, *(self.parent.path if self.parent else ())]


def find_prefixes(requests: Sequence[Request], known: Iterable[Prefix] = ()) -> list[Prefix | None]:
    """The longest prefix that each request shares with other requests of its adapter, or None.

    A prompt's last token is part of none, since the model makes the answer's first token of it. A
    prompt whose tokens are scored has none, since it is read whole.

    Args:
        known: prefixes of earlier requests, which are taken again where they are the same.
    """
    found: list[Prefix | None] = [None] * len(requests)
    places: dict[str | None, list[int]] = {}
    for i, request in enumerate(requests):
        if request.sampling is not None and request.sampling.prompt_logprobs is not None:
            continue
        places.setdefault(request.adapter, []).append(i)
    earlier = list(known)
    for adapter, of_adapter in places.items():
        same = {prefix.tokens: prefix for prefix in earlier if prefix.adapter == adapter}
        prefixes = _of_one_adapter([requests[i] for i in of_adapter], same)
        for i, prefix in zip(of_adapter, prefixes, strict=True):
            found[i] = prefix
    return found


def _of_one_adapter(
    requests: Sequence[Request], known: Mapping[tuple[int, ...], Prefix]
) -> list[Prefix | None]:
    # Bytes are compared much more quickly than tuples.
    keys = [np.array(request.tokens, ">u4").tobytes() for request in requests]
    order = sorted(range(len(requests)), key=keys.__getitem__)
    prompts = [requests[i].tokens for i in order]
    shared = [0, *(_common(a, b) for a, b in itertools.pairwise(prompts))]
    found: list[Prefix | None] = [None] * len(requests)
    for start, stop, prefix in _prefixes(prompts, shared, 0, len(prompts), None, known):
        for i in order[start:stop]:
            found[i] = prefix  # a longer one comes after those that it begins with
    for prefix in found:
        for part in prefix.path if prefix else ():
            part.waiting, part.adapter = part.waiting + 1, requests[0].adapter
    return found


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens that two prompts begin with, but the last of either."""
    known, most = 0, min(len(a), len(b)) - 1
    while known < most:  # comparing slices is much quicker than comparing tokens
        middle = (known + most + 1) // 2
        if a[known:middle] == b[known:middle]:
            known = middle
        else:
            most = middle - 1
    return known


def _prefixes(
    prompts: list[tuple[int, ...]],
    shared: list[int],
    start: int,
    stop: int,
    parent: Prefix | None,
    known: Mapping[tuple[int, ...], Prefix],
) -> Iterator[tuple[int, int, Prefix]]:
    """Prefixes of sorted prompts, and of which prompts: from where up to where.

    Args:
        shared: tokens that each prompt has in common with the one before.
        parent: a prefix of all prompts from `start` up to `stop`.
        known: earlier ones, by their tokens.
    """
    least = SHORTEST + (len(parent.tokens) if parent else 0)
    if parent and len(parent.path) == DEEPEST:
        return
    i = start + 1
    while i < stop:
        first = i - 1
        while i < stop and shared[i] >= least:
            i += 1
        if i > first + 1:
            tokens = prompts[first][: min(shared[first + 1 : i])]
            prefix = known.get(tokens) or Prefix(tokens, parent)
            yield first, i, prefix
            yield from _prefixes(prompts, shared, first, i, prefix, known)
        i += 1
