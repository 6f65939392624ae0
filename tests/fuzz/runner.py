"""Runs mutated inputs: a right result or a UserError of one line, in time and in memory."""

import contextlib
import dataclasses
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxmoe.errors import UserError
from tests.fuzz.mutations import mutate

SECONDS = 5
BYTES = 10**9  # of memory over the start


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        make: writes a right one into an empty folder.
        read: what users make of it.
        same: whether two results are equal.
        files: which files of the folder are damaged.
        checked: whether the data can tell that it is not what was written: another result is then
            a fault, and not another valid input.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    same: Callable[[Any, Any], bool]
    files: Callable[[Path], Iterable[Path]]
    checked: bool = False


GOOD = ("refused", "right", "other")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one input: one of `GOOD`, or a fault; `other` is another valid input."""

    kind: str
    seed: int
    file: str
    verdict: str
    detail: str = ""


class _Hang(BaseException):
    """Longer than `SECONDS`."""


def run(kind: Kind, seeds: range) -> Iterator[Outcome]:
    """Outcomes of a kind's inputs; memory that grew is a fault of the input that made it grow."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original = Path(scratch, "original")
        original.mkdir()
        kind.make(original)
        right = kind.read(original)
        assert kind.same(kind.read(original), right), "an undamaged input is read twice alike"
        start = _peak()
        for seed in seeds:
            outcome = try_one(kind, original, right, seed)
            grown = _peak() - start
            if grown > BYTES:
                detail = f"{grown / 1e9:.1f} GB"
                outcome = dataclasses.replace(outcome, verdict="memory", detail=detail)
                start += grown
            yield outcome


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def try_one(kind: Kind, original: Path, right: Any, seed: int) -> Outcome:
    """Damages one file of a copy, reads the copy, and judges."""
    draw = random.Random(f"{kind.name} {seed}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        folder = Path(scratch, "input")
        shutil.copytree(original, folder, symlinks=True)
        files = sorted(kind.files(folder))
        file = draw.choice(files)
        damage(file, files, draw)
        verdict, detail = judge(kind, folder, right)
    return Outcome(kind.name, seed, str(file.relative_to(folder)), verdict, detail)


def judge(kind: Kind, folder: Path, right: Any) -> tuple[str, str]:
    """The verdict on what comes of reading a folder, and what there is to say of it."""
    start = time.monotonic()
    try:
        with _limited():
            result = kind.read(folder)
    except UserError as error:
        verdict, detail = _judge_message(str(error))
    except _Hang:
        return "hang", f"over {SECONDS} s"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        verdict, detail = "traceback", "".join(traceback.format_exception(error))
    else:
        differs = "wrong" if kind.checked else "other"
        verdict, detail = "right" if kind.same(result, right) else differs, ""
    seconds = time.monotonic() - start
    return ("hang", f"{seconds:.1f} s") if seconds > SECONDS else (verdict, detail)


def damage(file: Path, files: list[Path], draw: random.Random) -> None:
    """Mutates a file, or exchanges, empties, removes or replaces it as a whole."""
    match draw.randrange(20):
        case 0:
            file.unlink()
        case 1:
            other = draw.choice(files)
            a, b = file.read_bytes(), other.read_bytes()
            file.write_bytes(b)
            other.write_bytes(a)
        case 2:
            file.unlink()
            file.mkdir()
        case 3:
            file.write_bytes(b"")
        case _:
            file.write_bytes(mutate(file.read_bytes(), file.name, draw))


def _judge_message(message: str) -> tuple[str, str]:
    try:
        message.encode()
    except UnicodeEncodeError:
        return "unprintable", repr(message)
    if "\n" in message or len(message) > 2000:
        return "long message", message[:3000]
    return "refused", message


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raises `_Hang` in the code within, after `SECONDS`."""

    def hang(*_):
        raise _Hang

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
