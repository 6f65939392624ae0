"""Pictures that were opened before: each is read and decoded once, whoever asks first."""

import threading
from collections.abc import Callable

from jaxmoe.images.picture import Picture


class Known:
    """Pictures by what they were opened from; threads may ask at the same time."""

    def __init__(self):
        self._pictures: dict[tuple, Picture] = {}
        self._locks: dict[tuple, threading.Lock] = {}

    def get(self, key: tuple, make: Callable[[], Picture]) -> Picture:
        """The picture of a key, which one thread makes while other threads wait for it.

        Args:
            make: makes it; where it raises, the next thread that asks tries again.
        """
        with self._locks.setdefault(key, threading.Lock()):
            if key not in self._pictures:
                self._pictures[key] = make()
            return self._pictures[key]
