"""The files of a job's folder: answers and errors in numbered parts, and journals until then.

Part 12 has the rows of block 12, and is there once all of them have ended. `--retry-errors` begins
a round: rows that failed run again, and their answers come in parts of their own, as `000012-r1`.
"""

import contextlib
import json
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple

from jaxmoe.batch.leases import LEASES
from jaxmoe.batch.parts import encode_part
from jaxmoe.batch.report import draw_report, encode_report, job_report, part_report
from jaxmoe.batch.storage import Storage
from jaxmoe.errors import UserError
from jaxmoe.files.atomic import writable

ANSWERS, ERRORS, REPORTS = "answers/", "errors/", "reports/"
JOURNAL, ROUNDS = "journal/", "rounds/"
_PART = re.compile(r"(\d{6,})(?:-r(\d+))?\.(?:jsonl|parquet|json)")


class Ended(NamedTuple):
    """A row that has its line of output.

    Attributes:
        number: of the row in the job.
        line: of the answers, or of the errors.
        failed: whether it is an error.
    """

    number: int
    line: dict[str, Any]
    failed: bool


class Parts(NamedTuple):
    """Which parts there are, by block and round."""

    answers: set[tuple[int, int]]
    errors: set[tuple[int, int]]

    def failed(self, round_: int) -> set[int]:
        """The blocks that have failed rows before a round."""
        return {block for block, of in self.errors if of < round_}

    def answered(self, round_: int) -> set[int]:
        """The blocks that have a part of a round before one."""
        return {block for block, of in self.answers if of < round_}


def parts_of(names: Iterable[str]) -> Parts:
    """The parts among the names of a folder's files."""
    found = Parts(set(), set())
    for name in names:
        folder, slash, rest = name.partition("/")
        if _PART.fullmatch(rest) and folder + slash in (ANSWERS, ERRORS):
            (found.answers if folder + slash == ANSWERS else found.errors).add(_key(rest))
    return found


def _key(name: str) -> tuple[int, int]:
    """The block and the round of a part, by its name without the folder."""
    matched = _PART.fullmatch(name)
    assert matched is not None
    return int(matched[1]), int(matched[2] or 0)


def part_name(block: int, round_: int) -> str:
    """The name of a block's part of a round, without its folder and ending."""
    return f"{block:06}-r{round_}" if round_ else f"{block:06}"


class JobFolder:
    """Reads and writes the parts and journals of one job."""

    def __init__(self, storage: Storage, form: Literal["jsonl", "parquet"], owner: str):
        """Opens nothing yet.

        Args:
            form: of the answers, `jsonl` or `parquet`; errors are lines of JSON.
            owner: the name of this process.
        """
        self.storage, self._form, self._owner = storage, form, owner

    def parts(self) -> Parts:
        """The parts that there are."""
        return parts_of([*self.storage.names(ANSWERS), *self.storage.names(ERRORS)])

    def is_published(self, block: int, round_: int) -> bool:
        """Whether a part is there."""
        return bool(self.storage.names(f"{ANSWERS}{part_name(block, round_)}."))

    def round(self) -> int:
        """The number of the newest round; 0 until failed rows were to run again."""
        return len(self.storage.names(ROUNDS))

    def begin_round(self, number: int) -> None:
        """Lets failed rows run again, unless another process has said so."""
        self.storage.create(f"{ROUNDS}{number}", self._owner.encode())

    def failed_rows(self, block: int, round_: int) -> set[int]:
        """The numbers of a block's rows that failed in the newest round before one."""
        before = (part_name(block, earlier) for earlier in reversed(range(round_)))
        found = (self.storage.read(f"{REPORTS}{name}.json") for name in before)
        report = next((content for content in found if content is not None), None)
        return set(json.loads(report)["failed"]) if report else set()

    def publish(self, block: int, round_: int, ended: Sequence[Ended], begun: float) -> None:
        """Writes a block's part, unless it is there; its answers come last, and say that it is.

        Args:
            ended: all its rows of the round, in their order.
            begun: when they were taken, in seconds since 1970.
        """
        name, failed = part_name(block, round_), [row for row in ended if row.failed]
        lines = [row.line for row in ended if not row.failed]
        report = part_report(lines, [row.number for row in failed], begun, time.time())
        if not self.is_published(block, round_):  # a dead owner may have left the first of these
            self.storage.put(f"{REPORTS}{name}.json", json.dumps(report).encode())
            if failed:
                errors = encode_part([row.line for row in failed], "jsonl")
                self.storage.put(f"{ERRORS}{name}.jsonl", errors)
            else:
                self.storage.delete(f"{ERRORS}{name}.jsonl")
            self.storage.create(f"{ANSWERS}{name}.{self._form}", encode_part(lines, self._form))
        for earlier in self._earlier_errors(block, round_):
            self.storage.delete(earlier)
        for journal in self.storage.names(f"{JOURNAL}{name}."):
            self.storage.delete(journal)

    def _earlier_errors(self, block: int, round_: int) -> list[str]:
        names = self.storage.names(f"{ERRORS}{block:06}")
        keys = {name: _key(name.removeprefix(ERRORS)) for name in names}
        return [name for name, (at, of) in keys.items() if at == block and of < round_]

    def summarize(self) -> dict[str, Any]:
        """Writes the report of the job, and a picture of it; returns the report.

        One that was made of the same parts is not made again.
        """
        parts = len(self.parts().answers)
        known = json.loads(self.storage.read("report.json") or b"{}")
        if known.get("parts") == parts:
            return known
        self._sweep()
        names = {_key(name.removeprefix(REPORTS)): name for name in self.storage.names(REPORTS)}
        contents = {key: self.storage.read(name) for key, name in names.items()}
        reports = {key: json.loads(text) for key, text in contents.items() if text is not None}
        newest = {block: len(reports[block, of]["failed"]) for block, of in sorted(reports)}
        left = sum(newest.values())
        report = job_report(reports.values()) | {"failed": left, "parts": parts}
        self.storage.put("report.json", encode_report(report))
        self.storage.put("report.png", draw_report(report))
        return report

    def _sweep(self) -> None:
        """Removes what programs left that were killed after they wrote a part."""
        answers, errors = self.parts()
        newest = dict(sorted(answers))
        for block, of in errors:
            if of < newest.get(block, 0):
                self.storage.delete(f"{ERRORS}{part_name(block, of)}.jsonl")
        whole = {part_name(*key) for key in answers}
        for folder in (JOURNAL, LEASES):
            for name in self.storage.names(folder):
                if name.removeprefix(folder).partition(".")[0] in whole:
                    self.storage.delete(name)

    def journaled(self, block: int, round_: int) -> dict[int, Ended]:
        """The rows of a part to come that ended before, by their numbers, whoever ran them."""
        found: dict[int, Ended] = {}
        for name in self.storage.names(f"{JOURNAL}{part_name(block, round_)}."):
            for line in (self.storage.read(name) or b"").split(b"\n")[:-1]:  # the last is torn
                with contextlib.suppress(ValueError):  # a loss of power leaves zeros
                    ended = Ended(*json.loads(line))
                    found.setdefault(ended.number, ended)
        return found

    def journal(self, block: int, round_: int) -> "Journal":
        """Opens this process's journal of a part to come."""
        name = f"{JOURNAL}{part_name(block, round_)}.{self._owner}"
        return Journal(f"{self.storage}/{name}", self.storage.append(name))


class Journal:
    """Keeps the rows of a part to come; on an object store, which cannot append, it keeps none."""

    def __init__(self, path: str, file: BinaryIO | None):
        """Writes to an open file; the path is for error messages."""
        self._path, self._file = path, file

    def write(self, ended: Ended) -> None:
        """Adds a row; once this returns, killing the process does not lose it.

        Raises:
            UserError: if the file system refuses.
        """
        if self._file is None:
            return
        with writable(self._path):
            self._file.write(json.dumps(ended).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a disk that is full, which `write` has said
                self._file.close()


def check_round(folder: JobFolder, parts: Parts, blocks: Iterable[int], retry: bool) -> int:
    """The round to run: the newest, or another one if failed rows are to run again.

    A round of these that has not ended goes on.

    Raises:
        UserError: if they are, while the job has not ended.
    """
    newest = folder.round()
    if not retry:
        return newest
    left = set(blocks) if not newest else parts.failed(newest)
    left -= {block for block, of in parts.answers if of == newest}
    if left and not newest:
        raise UserError("--retry-errors comes after the job has ended; run it without first.")
    if left or not parts.failed(newest + 1):
        return newest
    folder.begin_round(newest + 1)
    return newest + 1
