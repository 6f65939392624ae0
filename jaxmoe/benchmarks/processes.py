"""Runs checks and cases of a GPU benchmark in several processes, since compiling takes longest.

All prepare at once; then they time in turn, each alone on the GPU. Each process has its own CUDA
context, and takes the GPU's memory as it needs it.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

MOST = 12  # processes at once
CONTEXT_BYTES = 2 * 2**30  # of a process, beside its arrays: CUDA's context, workspaces
WAIT_SECONDS = 300  # for other processes to prepare, before all give up

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
        sizes: bytes of the GPU's memory that each call takes.
        memory: bytes that all processes together may take.
        processes: 1 to run the calls in this process.
    """
    if processes == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    for batch in batches(items, sizes, memory, processes):
        turn = context.Barrier(len(batch)), context.Lock()
        with ProcessPoolExecutor(len(batch), context, _join, (turn,)) as pool:
            yield from pool.map(function, batch)


def _join(turn: tuple[Any, Any]) -> None:
    global _turn
    _turn = turn


def batches[T](items: list[T], sizes: list[int], memory: int, most: int) -> list[list[T]]:
    """Consecutive items that fit into memory together, at most `most`, at least one."""
    found: list[list[T]] = []
    room = 0
    for item, size in zip(items, sizes, strict=True):
        room -= size + CONTEXT_BYTES
        if not found or room < 0 or len(found[-1]) == most:
            found.append([])
            room = memory - size - CONTEXT_BYTES
        found[-1].append(item)
    return found
