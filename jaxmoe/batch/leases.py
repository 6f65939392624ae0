"""Which process works on what: leases that end with their owner, in a folder that all share.

A lease is a file that is created once, named after the work and its turn: `leases/000012.3` is the
fourth time that block 12 is taken. Its owner counts in a file of its own while it lives. Whoever
wants the work watches that count by its own clock, so no clocks are compared, and takes the next
turn once the count has stood still for too long. Two owners at once are harmless: what they write
is created once, too.
"""

import contextlib
import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from jaxmoe.batch.process_name import has_ended, process_name
from jaxmoe.batch.storage import Storage
from jaxmoe.errors import UserError

LEASES, WORKERS = "leases/", "workers/"
EXPIRY = 60.0  # seconds without a sign of life after which an owner counts as dead
BEATS = 6  # signs of life in that time
MOMENT = 1 / 60  # of that time, in which an owner of many leases is looked at once


class Leases:
    """A context in which this process takes leases and shows that it lives.

    Attributes:
        owner: this process's name, which no other has.
    """

    def __init__(
        self,
        storage: Storage,
        expiry: float = EXPIRY,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Shows nothing yet.

        Args:
            expiry: seconds without a sign of life, after which another process takes the work.
        """
        self._storage, self._expiry, self._clock = storage, expiry, clock
        self.owner = f"{socket.gethostname():.40}-{uuid.uuid4().hex[:12]}"
        self._owners: dict[str, str] = {}  # of leases
        self._seen: dict[str, tuple[bytes, float]] = {}  # owner -> its last count, and since when
        self._alive: dict[str, float] = {}  # owner -> until when it counts as alive
        self._taken: set[str] = set()
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Leases":
        self._show(0)
        self._beating.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Gives back what is left, at once."""
        self._ended.set()
        self._beating.join()
        with contextlib.suppress(UserError):  # what remains expires
            for name in sorted(self._taken):
                self._storage.delete(name)
            self._storage.delete(WORKERS + self.owner)

    def take(self, work: str, names: Iterable[str]) -> bool:
        """Takes a lease, unless a living process has it.

        Args:
            names: of all leases, as they were listed a moment ago.
        """
        turn = _last_turn(work, names)
        if turn >= 0 and self._is_held(_name(work, turn)):
            return False
        name = _name(work, turn + 1)
        taken = self._storage.create(name, self.owner.encode())
        if taken:
            self._taken.add(name)
        return taken

    def has(self, work: str, names: Iterable[str]) -> bool:
        """Whether this process still has the lease; it has not if another took the next turn."""
        return _name(work, _last_turn(work, names)) in self._taken

    def end(self, work: str, names: Iterable[str]) -> None:
        """Removes the leases of work that is done."""
        own = {name for name in self._taken if _is_of(name, work)}
        for name in {name for name in names if _is_of(name, work)} | own:
            self._storage.delete(name)
        self._taken -= own

    def sweep(self) -> None:
        """Removes what processes left that were killed on this machine."""
        self._storage.sweep()
        for name in self._storage.names(WORKERS):
            if _has_ended(self._storage.read(name) or b""):
                self._storage.delete(name)

    def _is_held(self, name: str) -> bool:
        if name in self._owners and self._lives(self._owners[name]):
            return True
        content = self._storage.read(name)  # again: what was given back may have another owner
        if content is None:  # given back a moment ago
            return False
        self._owners[name] = content.decode(errors="replace")
        return self._lives(self._owners[name])

    def _lives(self, owner: str) -> bool:
        now = self._clock()
        if now < self._alive.get(owner, now):
            return True
        content = self._storage.read(WORKERS + owner)
        if content is None or _has_ended(content):
            return False
        last, since = self._seen.get(owner, (None, now))
        if content != last:
            since = now
        self._seen[owner] = content, since
        self._alive[owner] = min(now + MOMENT * self._expiry, since + self._expiry)
        return now < self._alive[owner]

    def _show(self, count: int) -> None:
        about = {"process": process_name(), "count": count}
        self._storage.put(WORKERS + self.owner, json.dumps(about).encode())

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(self._expiry / BEATS):
            count += 1
            with contextlib.suppress(UserError):  # a store that is away for a moment
                self._show(count)


def _name(work: str, turn: int) -> str:
    return f"{LEASES}{work}.{turn}"


def _last_turn(work: str, names: Iterable[str]) -> int:
    """The number of the last lease of some work; -1 if there is none."""
    turns = (int(name.rpartition(".")[2]) for name in names if _is_of(name, work))
    return max(turns, default=-1)


def _is_of(name: str, work: str) -> bool:
    return name.rpartition(".")[0] == LEASES + work


def _has_ended(content: bytes) -> bool:
    """Whether an owner was a process of this machine that is gone: none has to wait for it."""
    try:
        return has_ended(json.loads(content)["process"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
