"""Signals that ask a command to end after what it is doing, and to be run again."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

from jax.experimental import multihost_utils

from jaxmoe import processes
from jaxmoe.progress import note_work

SIGNALS = signal.SIGTERM, signal.SIGUSR1  # of schedulers and machines that are taken back


_polled = threading.Event()


def ends_by_itself() -> bool:
    """Whether this process asks for signals after each step, and ends by itself."""
    return _polled.is_set()


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether one of `SIGNALS` came; within the context none kills.

    Where there are several processes, all are to call it at the same places: it then says the same
    to all, once a signal has come to one of them; until the second call, a watchdog ends them.
    """
    came: list[int] = []
    if not processes.several():
        handlers = dict.fromkeys(SIGNALS, lambda number, _: came.append(number))
        said = lambda: bool(came)  # noqa: E731
    else:  # JAX has taken SIGTERM, and tells the other processes
        handlers, said = {}, _agreed()

    begun = False

    def asked() -> bool:
        nonlocal begun
        if begun:  # after the first step, which may have taken long to compile
            _polled.set()
        begun = True
        note_work()
        return said()

    before = {each: signal.signal(each, handler) for each, handler in handlers.items()}
    try:
        yield asked
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
