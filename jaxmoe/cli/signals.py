"""Signals that ask a command to end after what it is doing, and to be run again."""

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator

from jax.experimental import multihost_utils

from jaxmoe import processes

SIGNALS = signal.SIGTERM, signal.SIGUSR1  # of schedulers and machines that are taken back


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether one of `SIGNALS` came; within the context none kills.

    Where there are several processes, all are to call it at the same places: it then says the same
    to all, once a signal has come to one of them.
    """
    came: list[int] = []
    if not processes.several():
        handlers = dict.fromkeys(SIGNALS, lambda number, _: came.append(number))
        said = lambda: bool(came)  # noqa: E731
    else:  # JAX has taken SIGTERM, and tells the other processes
        handlers = {signal.SIGUSR1: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        said = _agreed()
    before = {each: signal.signal(each, handler) for each, handler in handlers.items()}
    try:
        yield said
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _agreed() -> Callable[[], bool]:
    """A function that says whether a signal came, to all processes at the same call."""
    calls, came = itertools.count(1), False

    def said() -> bool:
        nonlocal came
        came = came or multihost_utils.reached_preemption_sync_point(next(calls))
        return came

    return said
