"""A thread that ends a process whose program is stuck, or was told to end before it has begun.

All processes have one. They tell each other by a `Board` how far they are, and end together.
"""

import collections
import faulthandler
import json
import os
import sys
import threading
import time
from types import FrameType
from typing import NamedTuple

import jax

from jaxmoe import processes
from jaxmoe.cli import signals
from jaxmoe.cli.board import Board
from jaxmoe.cli.launch import seconds
from jaxmoe.compilation import watch_compilations
from jaxmoe.progress import work_done

LIMIT = "JAXMOE_WATCHDOG"  # seconds without any progress, after which a program is stuck; 0: never
DEFAULT = 3600
STUCK = os.EX_SOFTWARE  # the exit code
COMPILING = 3600  # seconds for which a compilation counts as progress
_POLL = 1.0  # seconds from one look to the next
_LOOKS = 20  # at the progress of all, within the limit
_MISSED = 3  # looks that a process is to miss before it counts as stopped
_GROUPS = 4  # of processes that a sentence speaks of
_STDERR = 2  # not `sys.stderr`, which is silent on all processes but the first
_SILENCE = 3.0  # seconds without an answer of the first process, after which the user is told
_ENDING = threading.Event()


class Mark(NamedTuple):
    """How far a process is.

    Attributes:
        looks: how often its watchdog has looked, which stands still if the process is stopped.
        shared: pieces of work done that all processes do.
        other: what else shows that it goes on: work of its own, seconds of compiling.
        place: the line of jaxmoe that its main thread is at.
    """

    looks: int
    shared: int
    other: int
    place: str


class End(NamedTuple):
    """Why all processes end.

    Attributes:
        code: their exit code.
        sentence: the reason.
        by: the number of the process that says so first.
    """

    code: int
    sentence: str
    by: int


def start() -> None:
    """Starts the watchdog of a process, where it is one of several or `JAXMOE_WATCHDOG` is set.

    Raises:
        UserError: if that is no number of seconds.
    """
    limit = seconds(LIMIT, DEFAULT, least=0)
    if processes.several() or (limit and LIMIT in os.environ):
        watchdog = Watchdog(Board(), jax.process_index(), jax.process_count(), limit)
        threading.Thread(target=watchdog.run, daemon=True, name="watchdog").start()


def give_way() -> None:
    """Waits for the end of the process if a watchdog is about to end it.

    What goes wrong then, such as a collective that another process has left, is no reason.
    """
    if _ENDING.is_set():
        threading.Event().wait()


class Watchdog:
    """The state of the thread."""

    def __init__(self, board: Board, number: int, count: int, limit: int):
        """Starts to watch compilations.

        Args:
            board: of the program.
            number: of this process.
            count: how many processes there are.
            limit: seconds without progress of any process, after which they end; 0: never.
        """
        self._board, self._number, self._count, self._limit = board, number, count, limit
        self._compiles = watch_compilations()
        self._period = max(1, round(limit / _LOOKS / _POLL))  # in polls
        self._polls = self._compiling = self._other = self._idle = 0
        self._marks: dict[str, Mark] = {}
        self._looks: dict[str, int] = {}  # of each process, by the middle of the limit

    def run(self) -> None:
        """Looks until the process ends.

        Time is counted in looks, so that a program that was stopped as a whole and goes on has not
        lost any.
        """
        while True:
            time.sleep(_POLL)
            told = threading.Timer(_SILENCE, _tell_silence)  # JAX, which then ends this, does not
            told.daemon = True
            told.start()
            try:
                end = self.look()
            except jax.errors.JaxRuntimeError:  # the first process is out of reach
                continue
            finally:
                told.cancel()
            if end is not None:
                self._finish(end)

    def look(self) -> End | None:
        """Why this process is to end now, if it is."""
        told = self._board.texts("end")
        if told:
            return End(*json.loads(min(told.items())[1]))
        self._polls += 1
        end = None
        if not signals.ends_by_itself() and self._board.has_notice():
            sentence = "told to end while there was nothing to save yet; run again."
            end = End(os.EX_TEMPFAIL, sentence, self._number)
        elif self._limit and not self._polls % self._period:
            end = self._stuck()
        if end is not None:
            self._board.put("end", f"{self._number:09}", json.dumps(end))
        return end

    def _stuck(self) -> End | None:
        """Writes and reads how far all are; says so if none has gone on within the limit."""
        self._compiling = self._compiling + 1 if self._compiles() else 0
        done = work_done()
        self._other += 0 < self._compiling * self._period * _POLL <= COMPILING
        mark = Mark(self._polls, done.shared, self._other + done.alone, _place())
        self._board.put("marks", str(self._number), json.dumps(mark))
        texts = self._board.texts("marks").items()
        marks = {number: Mark(*json.loads(text)) for number, text in texts}
        same = _progress(marks) == _progress(self._marks)
        self._marks, self._idle = marks, self._idle + 1 if same else 0
        idle = self._idle * self._period * _POLL
        if idle <= self._limit / 2:
            self._looks = {number: mark.looks for number, mark in marks.items()}
        if idle < self._limit:
            return None
        sure = self._idle >= 2 * _MISSED  # with a short limit, a watchdog may just be late
        numbers = map(str, range(self._count if sure else 0))
        silent = [n for n in numbers if n not in marks or marks[n].looks == self._looks[n]]
        return End(STUCK, stuck_sentence(self._limit, marks, silent), self._number)

    def _finish(self, end: End) -> None:
        """Ends the process, at about the same time as the others."""
        _ENDING.set()
        first, count = self._number == 0, self._count
        if end.code == STUCK:
            print(f"process {self._number} of {count}:", file=sys.__stderr__, flush=True)
            faulthandler.dump_traceback(_STDERR, all_threads=True)
        if first or (end.code == STUCK and end.by == self._number):
            word = "error" if end.code == STUCK else "stopped"
            print(f"{word}: {end.sentence}", file=sys.__stderr__, flush=True)
        if count > 1:  # the others are to see it before a collective fails; the store ends last
            time.sleep((5 if first else 3) * _POLL)
        os._exit(end.code)


def _tell_silence() -> None:
    print(f"process 0 does not answer for {_SILENCE:g} s", file=sys.__stderr__, flush=True)


def _progress(marks: dict[str, Mark]) -> dict[str, tuple[int, int]]:
    return {number: (mark.shared, mark.other) for number, mark in marks.items()}


def stuck_sentence(limit: int, marks: dict[str, Mark], silent: list[str]) -> str:
    """Says which processes hold up a program.

    Args:
        limit: seconds without progress.
        marks: how far each process is.
        silent: the numbers of the processes that do not answer.
    """
    if silent:
        who = f"process {_listed(silent)} does not answer"
    else:
        who = "; ".join(_groups(marks)[:_GROUPS])
    return (
        f"nothing has gone on for {limit} s: {who}. The stacks of all processes are on stderr; run "
        f"again, and give {LIMIT} more seconds if that was work."
    )


def _groups(marks: dict[str, Mark]) -> list[str]:
    """Which processes are where, the likeliest cause first: behind the others, or unlike them."""
    most = max(mark.shared for mark in marks.values())
    groups = collections.defaultdict(list)
    for number, mark in marks.items():
        groups[mark.shared, mark.place].append(number)
    found = sorted(groups.items(), key=lambda item: (item[0][0], len(item[1])))
    return [
        f"process {_listed(numbers)} is {'' if shared == most else 'behind, '}{place}"
        for (shared, place), numbers in found
    ]


def _listed(numbers: list[str]) -> str:
    return ", ".join(sorted(numbers, key=int))


def _place() -> str:
    """The line of jaxmoe that the main thread is at, such as `in read_bytes (parsing.py:66)`."""
    main = threading.main_thread().ident
    frame: FrameType | None = sys._current_frames().get(main or 0)
    while frame is not None:
        file, code = frame.f_globals.get("__name__", ""), frame.f_code
        if file.partition(".")[0] == "jaxmoe":
            return f"in {code.co_name} ({file}:{frame.f_lineno})"
        frame = frame.f_back
    return "outside of jaxmoe"
