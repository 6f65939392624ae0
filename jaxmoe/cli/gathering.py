"""How the processes of a program meet before JAX connects them.

JAX ends a process with a stack where another one does not come, and does not say which. Here the
first process listens at the address that will be the coordinator's, and the others tell it their
numbers.
"""

import contextlib
import os
import socket
import time

from jaxmoe.errors import AbsentProcesses, UserError

GREETING = "jaxmoe"  # the first word of what a process says, before its number and the count
COMPLETE = "all have come"  # what the first process answers; anything else is an error's sentence
MISSING = "missing: "  # which begins with this if processes did not come
MOST_BYTES = 4096  # of a message
_PATIENCE = 5.0  # seconds for one connection or message
_PAUSE = 0.5  # seconds from one try to connect to the next


def gather(address: str, count: int, number: int, patience: int) -> None:
    """Waits until all processes have come.

    Args:
        address: HOST:PORT of the first process.
        count: how many processes there are.
        number: this one's, from 0.
        patience: seconds.

    Raises:
        UserError: if some do not come, which names them, or several have one number.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or not host:
        raise UserError(f"the address {address} of the first process is not HOST:PORT.")
    deadline = time.monotonic() + patience
    if number == 0:
        own = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", address)
        _receive(int(own.rpartition(":")[2]), count, deadline, patience)
    else:
        _report((host.strip("[]"), int(port)), f"{GREETING} {number} {count}", deadline, patience)


def _receive(port: int, count: int, deadline: float, patience: int) -> None:
    """Waits for the other processes, and tells all of them what has come of it."""
    came: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(port))
        try:
            while len(came) < count - 1:
                _admit(came, stack.enter_context(_accepted(server, deadline)), count)
        except TimeoutError:
            missing = [str(number) for number in range(1, count) if number not in came]
            many = "es" if len(missing) > 1 else ""
            sentence = (
                f"process{many} {', '.join(missing)} of {count} did not come within {patience} "
                "s; start all processes, and let them reach the first one."
            )
            _tell(came, MISSING + sentence)
            raise AbsentProcesses(sentence) from None
        except UserError as error:
            _tell(came, str(error))
            raise
        _tell(came, COMPLETE)


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        raise UserError(
            f"port {port} of the first process cannot be used ({error.strerror}); choose another."
        ) from None


def _accepted(server: socket.socket, deadline: float) -> socket.socket:
    """The next connection.

    Raises:
        TimeoutError: if none comes in time.
    """
    server.settimeout(max(0.0, deadline - time.monotonic()) or 1e-3)
    found, _ = server.accept()
    found.settimeout(_PATIENCE)
    return found


def _admit(came: dict[int, socket.socket], new: socket.socket, count: int) -> None:
    """Adds a process that has come; what is none, such as a port scanner, is left aside.

    Processes that have gone again in the meantime are removed.

    Raises:
        UserError: if it speaks of another count, or one of its number is there.
    """
    for number in [number for number, each in came.items() if _has_gone(each)]:
        del came[number]
    word, *numbers = _heard(new).split(" ")
    if word != GREETING or len(numbers) != 2 or not all(text.isdecimal() for text in numbers):
        return
    number, theirs = map(int, numbers)
    wrong = ""
    if theirs != count or not 0 < number < count:
        wrong = f"process {number} of {theirs} has come to a program of {count} processes"
    elif number in came:
        wrong = f"two processes have the number {number}"
    came[-1 if wrong else number] = new
    if wrong:
        raise UserError(f"{wrong}; correct what starts them.")


def _has_gone(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(_PATIENCE)


def _tell(came: dict[int, socket.socket], sentence: str) -> None:
    """Answers all, and lets each end its connection, which frees the port for JAX."""
    for connection in came.values():
        with contextlib.suppress(OSError):
            connection.sendall(f"{sentence}\n".encode())
    for connection in came.values():
        with contextlib.suppress(OSError):
            connection.recv(1)


def _report(address: tuple[str, int], greeting: str, deadline: float, patience: int) -> None:
    """Tells the first process that this one has come, until it answers."""
    answer, why = "", "it gave no answer"
    while not answer and time.monotonic() < deadline:
        try:
            with socket.create_connection(address, _PATIENCE) as connection:
                connection.sendall(f"{greeting}\n".encode())
                connection.settimeout(patience + _PATIENCE)  # it waits as long, from now at most
                answer = _heard(connection)
        except OSError as error:
            why = error.strerror or str(error)
        if not answer:
            time.sleep(_PAUSE)
    if not answer:
        raise AbsentProcesses(
            f"the first process was not found at {':'.join(map(str, address))} within "
            f"{patience} s ({why}); start it, and give an address that all reach."
        )
    if answer.startswith(MISSING):
        raise AbsentProcesses(answer.removeprefix(MISSING))
    if answer != COMPLETE:
        raise UserError(answer)


def _heard(connection: socket.socket) -> str:
    """A line; empty if there is none."""
    content = b""
    with contextlib.suppress(OSError):
        while not content.endswith(b"\n") and len(content) < MOST_BYTES:
            piece = connection.recv(MOST_BYTES)
            if not piece:
                return ""
            content += piece
    return content.decode(errors="replace").strip()
