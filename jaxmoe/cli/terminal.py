"""What all commands share: exit codes, and one line for errors and interrupts."""

import contextlib
import io
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, cast

import jax

from jaxmoe import processes
from jaxmoe.cli import watchdog
from jaxmoe.errors import AbsentProcesses, Stopped, UserError, sentence_of
from pallas_kernels.compile.errors import CompilerError


def run(main: Callable[[], None]) -> None:
    """Runs a command, and exits the process if it fails.

    A mistake of the user is printed as one line, with exit code 1, and so are a full disk and lack
    of memory. Work that was told to end early ends with exit code 75, which says that running it
    again goes on with it, and Ctrl-C with 130.
    """
    _open_closed()
    for stream in (sys.stdout, sys.stderr):  # a terminal may not be able to print all of Unicode
        cast(io.TextIOWrapper, stream).reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except (UserError, CompilerError) as error:
        code = os.EX_UNAVAILABLE if isinstance(error, AbsentProcesses) else 1
        _fail(f"error: {UserError(str(error))}", code)
    except Stopped as stopped:  # all processes are, and end together
        print(f"stopped: {stopped}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except BrokenPipeError:  # the reader of stdout, such as `head`, has ended
        _forget_stdout()
        _exit(1)
    except OSError as error:  # such as a full disk
        _forget_stdout()
        _fail(f"error: {sentence_of(error)}")
    except (MemoryError, RuntimeError) as error:  # JAX raises RuntimeError for a device's memory
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            _raise(error)
        why = str(error).partition("\n")[0].rstrip(".")
        _fail(
            f"error: the memory does not suffice{f' ({why:.300})' if why else ''}; use more "
            "devices, fewer tokens at once or smaller weights: jaxmoe plan says what fits."
        )
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        _raise(error)


def _fail(message: str, code: int = 1) -> NoReturn:
    """Says why the command ends, of several processes which one, and ends it."""
    watchdog.give_way()
    if processes.several():  # all but the first are silent otherwise
        message += f" [process {jax.process_index()} of {jax.process_count()}]"
        print(message, file=sys.__stderr__)
    else:
        print(message, file=sys.stderr)
    _exit(code)


def _raise(error: Exception) -> NoReturn:
    """Ends the process with a traceback, which is of a mistake in this program.

    Where there are several processes, JAX's errors of communication are first of all of another
    one that has ended.
    """
    if not processes.several():
        raise error
    watchdog.give_way()
    if _is_of_others(str(error)):
        why = str(error).partition("\n")[0].rstrip(".")
        _fail(
            f"error: another process has ended or is out of reach; its log says why ({why:.300}).",
            os.EX_UNAVAILABLE,
        )
    traceback.print_exception(error, file=sys.__stderr__)
    _exit(1)


def _is_of_others(message: str) -> bool:
    return any(word in message for word in ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED"))


def _exit(code: int) -> NoReturn:
    """Ends the process; one of several does not wait for the others, which would wait for it."""
    if not processes.several():
        sys.exit(code)
    for stream in (sys.stdout, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):
            cast(io.TextIOWrapper, stream).flush()
    if processes.is_first():  # they end with it, and may be about to say the same
        time.sleep(1)
    os._exit(code)


def _open_closed() -> None:
    """Opens /dev/null in place of stdout and stderr if they are closed, as under some services."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # stays open until the process ends


def _forget_stdout() -> None:
    """Redirects stdout to /dev/null: flushing its buffer at exit would raise the error again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
