"""Scripts as several processes of one program."""

import os
import socket
import subprocess

from tests.scripts import FOLDER
from tests.scripts.forks import Forked


def start(script, *args, **environment: str) -> Forked:
    """Begins a script in a process of its own."""
    return Forked([str(word) for word in (FOLDER / script, *args)], {**os.environ, **environment})


def start_together(count: int, script, *args, **environment: str) -> list[Forked]:
    """Begins a script as so many processes of one program."""
    return start_each([(script, *args)] * count, **environment)


def start_each(commands: list[tuple], **environment: str) -> list[Forked]:
    """Begins one program, a process for each command."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"JAXMOE_COORDINATOR": f"localhost:{port}", "JAXMOE_NUM_PROCESSES": str(len(commands))}
    shared |= environment
    return [start(*each, **shared, JAXMOE_PROCESS_ID=str(i)) for i, each in enumerate(commands)]


def ends(processes: list[Forked]) -> tuple[list[int], list[str], list[str]]:
    """What the processes return, and wrote to stdout and to stderr."""
    try:
        said = [process.communicate(timeout=300) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        raise AssertionError([process.communicate() for process in processes]) from None
    out, err = (list(texts) for texts in zip(*said, strict=True))
    return [process.returncode for process in processes], out, err


def succeed(count: int, script, *args) -> None:
    """Runs a script as so many processes, which end well."""
    codes, _, said = ends(start_together(count, script, *args))
    assert codes == [0] * count, said
