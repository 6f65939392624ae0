"""Runs checks and cases of a GPU benchmark in several processes, since compiling takes longest.

All prepare at once; then they time in turn, each alone on the GPU. Each process has its own CUDA
context, and takes the GPU's memory as it needs it.
"""

import contextlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

MOST = 12  # processes at once
CONTEXT_BYTES = 4 * 2**30  # of a process: CUDA's context, workspaces, what autotuning tries
DEFAULT_FRACTION = 0.75  # of a GPU's memory that JAX takes, unless a variable says otherwise
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
WAIT_SECONDS = 900  # for other processes to prepare, before all give up

_turn: tuple[Any, Any] | None = None  # the barrier and the lock that this process shares


def share_memory() -> None:
    """Lets processes take memory as they need it; called before JAX starts."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Waits until all processes are prepared, and then for this one's turn on the GPU."""
    if _turn is None:
        yield
        return
    prepared, lock = _turn
    prepared.wait(WAIT_SECONDS)
    with lock:
        yield


def run_each[T, Result](
    function: Callable[[T], Result], items: list[T], processes: int
) -> Iterator[Result]:
    """The results of independent calls, in order, each of which may use the GPU at any time.

    Args:
        function: a module's function, or a `functools.partial` of one.
        processes: 1 to run the calls in this process.
    """
    if processes == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        yield from pool.map(function, items)


def run_in_turn[T, Result](
    function: Callable[[T], Result], items: list[T], sizes: list[int], memory: int, processes: int
) -> Iterator[Result]:
    """The results of calls that time something inside of one `alone()` each, in order.

    Args:
        function: as of `run_each`; it enters `alone` exactly once.
        sizes: bytes of each call's arrays; its process may take twice as many, and a context.
        memory: bytes that JAX takes of the GPU in one process, for all of these together.
        processes: 1 to run the calls in this process.
    """
    if processes == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    fraction = float(os.environ.get(FRACTION, DEFAULT_FRACTION))
    for batch in batches([_share(size) for size in sizes], memory, processes):
        turn = context.Barrier(len(batch)), context.Lock()
        with ProcessPoolExecutor(len(batch), context, _join, (turn,)) as pool:
            parts = [min(1, _share(sizes[i]) / memory) * fraction for i in batch]
            chosen = [items[i] for i in batch]
            yield from pool.map(_run_in, itertools.repeat(function), chosen, parts)


def _join(turn: tuple[Any, Any]) -> None:
    global _turn
    _turn = turn


def _share(size: int) -> int:
    return 2 * size + CONTEXT_BYTES


def _run_in(function: Callable, item, fraction: float):
    """Runs the only call of this process, before which JAX has not started."""
    os.environ[FRACTION] = str(fraction)
    return function(item)


def batches(sizes: list[int], memory: int, most: int) -> list[list[int]]:
    """Indices of consecutive sizes that fit into memory together: at least one, at most `most`."""
    found: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        room -= size
        if not found or room < 0 or len(found[-1]) == most:
            found.append([])
            room = memory - size
        found[-1].append(i)
    return found
