"""What all commands share: exit codes, and one line for errors and interrupts."""

import io
import os
import sys
from collections.abc import Callable
from typing import cast

from jaxmoe.errors import Stopped, UserError
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
        print(f"error: {UserError(str(error))}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except BrokenPipeError:  # the reader of stdout, such as `head`, has ended
        _forget_stdout()
        sys.exit(1)
    except OSError as error:  # such as a full disk
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}.", file=sys.stderr)
        _forget_stdout()
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:  # JAX raises RuntimeError for a device's memory
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = str(error).partition("\n")[0].rstrip(".")
        print(
            f"error: the memory does not suffice{f' ({why:.300})' if why else ''}; use more "
            "devices, fewer tokens at once or smaller weights: jaxmoe plan says what fits.",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _open_closed() -> None:
    """Opens /dev/null in place of stdout and stderr if they are closed, as under some services."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # stays open until the process ends


def _forget_stdout() -> None:
    """Redirects stdout to /dev/null: flushing its buffer at exit would raise the error again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
