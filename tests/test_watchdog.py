"""When a watchdog ends its process, and what it says: several of them on one board, by hand."""

import os

import pytest

from jaxmoe import progress
from jaxmoe.cli import signals, watchdog
from jaxmoe.cli.board import Board
from jaxmoe.cli.watchdog import End, Mark, Watchdog, stuck_sentence

LIMIT = 10  # seconds, and so many looks


class SharedBoard(Board):
    notice = False

    def has_notice(self):
        return self.notice


@pytest.fixture
def board(monkeypatch):
    monkeypatch.setattr(progress, "_done", progress.Work())
    monkeypatch.setattr(signals, "_polled", watchdog.threading.Event())
    return SharedBoard()


def dogs(board, count):
    return [Watchdog(board, number, count, LIMIT) for number in range(count)]


def looks(several, count):
    """What the first end is of so many looks of each."""
    for _ in range(count):
        for each in several:
            if (end := each.look()) is not None:
                return end
    return None


def test_a_program_without_progress_ends_within_the_limit(board):
    both = dogs(board, 2)
    end = looks(both, LIMIT + 3)
    assert end is not None and end.code == watchdog.STUCK == 70
    assert "nothing has gone on for 10 s: process 0, 1 is in " in end.sentence
    assert [each.look() for each in both] == [end, end]  # all end for the same reason


def test_work_keeps_a_program_alive(board):
    both = dogs(board, 2)
    for _ in range(5):
        assert looks(both, LIMIT - 2) is None
        progress.note_work()
    assert looks(both, LIMIT + 3) is not None


def test_a_process_that_waits_for_one_that_works_is_not_stuck(board, monkeypatch):
    """Also where that one compiles, or does alone what the others wait for."""
    waits, works = dogs(board, 2)
    works._compiles = lambda: True
    assert looks([waits, works], 3 * LIMIT) is None
    monkeypatch.setattr(watchdog, "COMPILING", 3 * LIMIT)  # but not forever
    assert looks([waits, works], LIMIT + 3) is not None


def test_a_stopped_process_is_named(board):
    goes_on, stopped = dogs(board, 2)
    looks([goes_on, stopped], 2)
    assert "process 1 does not answer" in looks([goes_on], LIMIT + 3).sentence


def test_a_process_that_never_answered_is_named(board):
    assert "process 1, 2 does not answer" in looks(dogs(board, 3)[:1], LIMIT + 3).sentence


def test_the_one_that_is_behind_or_elsewhere_is_named_first():
    reads, waits = "in read_bytes (jaxmoe.parsing:52)", "in from_all (jaxmoe.processes:92)"
    marks = {str(n): Mark(9, 5, 0, waits) for n in range(12)}
    said = stuck_sentence(10, marks | {"10": Mark(9, 4, 0, reads)}, [])
    assert f"10 s: process 10 is behind, {reads}; process 0, 1, 2, " in said
    said = stuck_sentence(10, marks | {"3": Mark(9, 5, 0, reads)}, [])
    assert f"10 s: process 3 is {reads}; process 0, 1, 2, 4, " in said


def test_a_notice_ends_what_has_nothing_to_save_yet(board):
    begins, runs = dogs(board, 2)
    assert looks([begins, runs], 2) is None
    board.notice = True
    end = begins.look()
    assert end == End(os.EX_TEMPFAIL, end.sentence, 0)
    signals._polled.set()
    assert runs.look() == end  # it would wait for the other one forever


def test_a_notice_leaves_a_command_that_asks_for_it_alone(board):
    board.notice = True
    with signals.asked_to_stop() as stop:
        assert not stop()  # the first step follows, whose compilation may take long
        assert not signals.ends_by_itself()
        assert not stop()
        assert looks(dogs(board, 2), 2) is None


def test_no_limit_is_none(board):
    assert looks([Watchdog(board, 0, 1, 0)], 100) is None


def test_work_of_the_first_process_alone_is_told_apart(board):
    from jaxmoe import processes

    def act():
        processes._alone.set(True)
        progress.note_work()

    processes.contextvars.copy_context().run(act)
    progress.note_work()
    assert progress.work_done() == progress.Work(shared=1, alone=1)
