"""Prompts with pictures, several at once: Pillow decodes outside Python's lock."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from jaxmoe.errors import UserError

THREADS = max(2, min(8, os.cpu_count() or 1))  # a large picture takes some 300 MB


def outcomes[T, S](
    function: Callable[[S], T], items: Sequence[S], in_threads: bool
) -> list[T | UserError]:
    """What a function returns for each item, or the UserError that it raises, in their order."""
    threads = min(THREADS, len(items)) if in_threads else 1

    def outcome(item: S) -> T | UserError:
        try:
            return function(item)
        except UserError as error:
            return error

    if threads < 2:
        return list(map(outcome, items))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(outcome, items))
