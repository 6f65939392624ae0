"""Processes that meet before JAX connects them: what they say if one does not come."""

import socket
import threading
import time

import pytest

from jaxmoe.cli.gathering import gather
from jaxmoe.errors import AbsentProcesses, UserError


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def together(address, processes, patience=2):
    """What each process ends with: the sentence of its error, or nothing.

    Before the sentence "absent: " says that the error is that of processes that did not come.
    """
    said = [""] * len(processes)

    def come(place, number, count):
        try:
            gather(address, count, number, patience)
        except UserError as error:
            absent = isinstance(error, AbsentProcesses)
            said[place] = f"absent: {error}" if absent else str(error)

    threads = [
        threading.Thread(target=come, args=(place, *each), daemon=True)
        for place, each in enumerate(processes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_all_come(address):
    assert together(address, [(n, 4) for n in range(4)], patience=60) == [""] * 4
    assert together(address, [(n, 4) for n in range(4)], patience=60) == [""] * 4  # started again


def test_those_that_do_not_come_are_named_to_all(address):
    first, third = together(address, [(0, 5), (2, 5)])
    assert first.startswith("absent: processes 1, 3, 4 of 5 did not come within 2 s; start all")
    assert third == first


def test_the_first_does_not_come(address):
    (said,) = together(address, [(1, 2)], patience=1)
    assert said.startswith(f"absent: the first process was not found at {address} within 1 s (")


@pytest.mark.parametrize(
    "processes, words",
    [
        ([(0, 3), (1, 3), (1, 3)], "two processes have the number 1; correct"),
        ([(0, 2), (1, 3)], "process 1 of 3 has come to a program of 2 processes; correct"),
        ([(0, 2), (5, 2)], "process 5 of 2 has come to a program of 2 processes; correct"),
    ],
)
def test_processes_that_do_not_fit(address, processes, words):
    assert all(said.startswith(words) for said in together(address, processes, patience=60))


def test_what_is_no_process_is_left_aside(address):
    """Such as a port scanner, or a process that has ended before the others came."""
    host, port = address.split(":")
    said = []
    first = threading.Thread(
        target=lambda: said.append(together(address, [(0, 3)], 60)), daemon=True
    )
    first.start()
    for content in (b"", b"GET / HTTP/1.1\r\n\r\n", b"jaxmoe 1\n", b"jaxmoe 1 3", b"jaxmoe 1 3\n"):
        with connected(host, int(port)) as stray:
            stray.sendall(content)
    assert together(address, [(1, 3), (2, 3)], 60) == ["", ""]
    first.join()
    assert said == [[""]]


def connected(host, port):
    for _ in range(1000):
        try:
            return socket.create_connection((host, port))
        except OSError:
            time.sleep(0.01)
    raise AssertionError("nothing listens")


@pytest.mark.parametrize("wrong", ["host", "host:", ":1", "host:http"])
def test_no_address(wrong):
    with pytest.raises(UserError, match="is not HOST:PORT"):
        gather(wrong, 2, 1, 1)
