"""A lock whose waiters have it in the order in which they asked; those of Python promise no order.

A thread that generates takes the lock for each step, and would keep other threads from it.
"""

import collections
import threading


class Turns:
    """A context that one thread at a time is in, the one that has waited longest first."""

    def __init__(self):
        self._changed = threading.Condition()
        self._waiting: collections.deque[object] = collections.deque()

    def __enter__(self) -> None:
        mine = object()
        with self._changed:
            self._waiting.append(mine)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is mine)
            except BaseException:  # an interrupt, after which no other may wait for this thread
                self._waiting.remove(mine)
                self._changed.notify_all()
                raise

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._waiting.popleft()
            self._changed.notify_all()
