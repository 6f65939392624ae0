"""Signals that ask a command to end after what it is doing, and to be run again."""

import contextlib
import signal
from collections.abc import Callable, Iterator

SIGNALS = signal.SIGTERM, signal.SIGUSR1  # of schedulers and machines that are taken back


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether one of `SIGNALS` came; within the context none kills."""
    came: list[int] = []
    before = {each: signal.signal(each, lambda number, _: came.append(number)) for each in SIGNALS}
    try:
        yield lambda: bool(came)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
