"""Two processes of which one is stopped, killed or told to end while there is no work yet.

They read requests from a FIFO that nothing is written to, as from a file system that hangs.
"""

import os
import signal
import time

import pytest

from tests.scripts import together


@pytest.fixture
def start(small, tmp_path):
    """Starts the two; returns once one of them reads, and the other one is about to."""
    fifo = tmp_path / "requests.jsonl"
    os.mkfifo(fifo)
    opened = []

    def start(**environment):
        words = ("generate.py", small.checkpoint, "--prompts", fifo, "--cpu-devices", 1)
        processes = together.start_together(2, *words, **environment)
        while not opened and all(process.poll() is None for process in processes):
            try:
                opened.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:
                time.sleep(0.1)
        assert opened, together.ends(processes)
        time.sleep(1)
        return processes

    yield start
    for number in opened:
        os.close(number)


@pytest.mark.slow
def test_a_program_that_hangs_says_where(start):
    codes, _, said = together.ends(start(JAXMOE_WATCHDOG="2"))
    assert codes == [70, 70]
    assert "nothing has gone on for 2 s: process 0, 1 is in read_bytes (jaxmoe.parsing:" in said[0]
    for number, text in enumerate(said):  # each with its own stack
        assert f"process {number} of 2:\n" in text and "parsing.py" in text


def test_a_stopped_process_is_named(start):
    first, second = start(JAXMOE_WATCHDOG="6", JAXMOE_HEARTBEAT="100")
    second.send_signal(signal.SIGSTOP)
    codes, _, said = together.ends([first])
    second.kill()
    together.ends([second])
    assert codes == [70] and "process 1 does not answer" in said[0]


@pytest.mark.slow
def test_a_stopped_first_process_is_named(start):
    first, second = start()
    first.send_signal(signal.SIGSTOP)
    codes, _, said = together.ends([second])
    first.kill()
    together.ends([first])
    assert codes == [-signal.SIGABRT] and "process 0 does not answer" in said[0]


def test_a_killed_process_ends_the_other_within_seconds(start):
    processes = start()
    processes[1].kill()
    killed = time.monotonic()
    codes, _, said = together.ends(processes)
    assert codes == [-signal.SIGABRT, -signal.SIGKILL]
    assert "unhealthy (stopped sending heartbeats):\n1\n" in said[0]
    assert time.monotonic() - killed < 10


def test_a_signal_before_there_is_work_ends_both(start):
    processes = start()
    processes[1].send_signal(signal.SIGUSR1)  # which counts as SIGTERM
    codes, _, said = together.ends(processes)
    assert codes == [75, 75], said
    assert "stopped: told to end while there was nothing to save yet; run again." in said[0]
    assert "stopped:" not in said[1]
