"""The file of a job's answers: each is kept once it is there, whatever ends the run.

Answers are appended to `NAME.partial` as they come, after a first line that names the job. A run of
the same job goes on there. Once all are there they become `NAME`, in the order of the requests.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxmoe.errors import UserError
from jaxmoe.files import outputs
from jaxmoe.generation.jobs import Refusal
from jaxmoe.generation.request import Request
from jaxmoe.parsing import parse_json
from jaxmoe.processes import is_first, on_first

Line = dict[str, Any]
WHOLE = ".whole"  # NAME.whole is written from NAME.partial and renamed


def job_digest(settings: Any, requests: Iterable[Request | Refusal]) -> str:
    """Names a job: the same only for the same requests and settings.

    Args:
        settings: what JSON can hold, and dataclasses.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=vars).encode())
    for request in requests:
        parts = request.record if isinstance(request, Refusal) else _parts(request)
        digest.update(json.dumps(parts, default=vars).encode() + b"\n")
    return digest.hexdigest()


def _parts(request: Request) -> dict[str, Any]:
    """What JSON can hold of a request, and what its pictures look like."""
    rest = {key: value for key, value in vars(request).items() if key != "pictures"}
    if request.adapter is None:
        del rest["adapter"]
    looks = [picture.digest.hex() for picture in request.pictures]
    return rest | {"pictures": looks} if looks else rest


def encode(record: Line) -> bytes:
    """An output record as a line of JSON."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


class Answers:
    """A context in which a job's answers are written, of several processes by the first.

    Attributes:
        done: ids, as text, of the requests that an earlier run has answered.
        complete: whether an earlier run has finished the whole job.
    """

    def __init__(self, path: str | Path, job: str, requests: list[Request | Refusal]):
        """Opens nothing yet.

        Args:
            job: as `job_digest` names it.
        """
        self.path, self.job, self.requests = path, job, requests
        self.done: set[str] = set()
        self.complete = False
        self._places: dict[str, tuple[int, int]] = {}  # id -> start and length of its line
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Answers":
        """Finds what an earlier run has answered.

        Raises:
            UserError: if the file exists and is not empty, is being written by another run, was
                left by another job, or cannot be written.
        """
        with contextlib.ExitStack() as stack:
            self.complete, done = on_first(lambda: self._open(stack))
            self.done = set(done)
            self._stack = stack.pop_all()
        return self

    def _open(self, stack: contextlib.ExitStack) -> tuple[bool, list[str]]:
        """Opens the file; whether it is complete, and the ids that have their answers."""
        stack.enter_context(outputs.writable(self.path))
        self._direct = outputs.direct(self.path)
        if self._direct is not None:
            stack.enter_context(self._direct)
            self._write_refusals(self._direct)
            return False, []
        self._place = outputs.place_of(self.path)
        self._file, self._partial = stack.enter_context(outputs.locked(self._place))
        complete = self._resume()
        return complete, list(self._places)

    def __exit__(self, kind: type | None, *rest: Any) -> None:
        with self._stack:
            if kind is None and not self.complete:
                on_first(self._finish)

    def write(self, record: Line) -> None:
        """Adds the answer to a request; once this returns, killing the process does not lose it.

        Raises:
            UserError: if the file system refuses.
        """
        if not is_first():
            return
        line = encode(record)
        with outputs.writable(self.path):
            if self._direct is not None:
                self._direct.write(line)
                self._direct.flush()
            else:
                self._places[str(record["id"])] = self._file.tell(), len(line)
                self._file.write(line)
                self._file.flush()

    def _write_refusals(self, file: BinaryIO) -> None:
        file.writelines(encode(line.record) for line in self.requests if isinstance(line, Refusal))
        file.flush()

    def _resume(self) -> bool:
        """Finds the answers of an earlier run; whether it finished the job."""
        begun = self._read_header()
        if begun:
            self._index()
        if self._place.exists() and self._place.stat().st_size:
            if not begun or not self._has_become(self._place):
                raise UserError(
                    f"{self.path} exists and is not empty; choose another output or delete it."
                )
            self._partial.unlink()  # killed between the last two steps of `_finish`
            return True
        if not begun:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(encode({"job": self.job}))
            self._file.flush()
        return False

    def _read_header(self) -> bool:
        """Whether an earlier run of this job began."""
        header = self._file.readline()
        if not header.endswith(b"\n"):  # killed before the first answer
            return False
        if header != encode({"job": self.job}):
            raise UserError(
                f"{self._partial} was left by another job, or by this one with other settings; "
                "delete it, or choose another output."
            )
        return True

    def _index(self) -> None:
        """Finds the answers; what was being written when the process was killed is cut off."""
        end = self._file.tell()
        for number, line in enumerate(self._file, start=2):
            if not line.endswith(b"\n"):
                break
            record = parse_json(line, f"{self._partial} line {number}")
            if not isinstance(record, dict) or "id" not in record:
                raise UserError(f"{self._partial} line {number} is no answer; delete the file.")
            self._places[str(record["id"])] = end, len(line)
            end += len(line)
        self._file.seek(end)
        self._file.truncate()

    def _lines(self) -> Iterator[bytes]:
        """The lines of output in the order of the requests, up to the first that has no answer."""
        for line in self.requests:
            if isinstance(line, Refusal):
                yield encode(line.record)
                continue
            if str(line.id) not in self._places:
                return
            start, length = self._places[str(line.id)]
            self._file.seek(start)
            yield self._file.read(length)

    def _has_become(self, place: Path) -> bool:
        with open(place, "rb") as file:
            return all(a == b for a, b in itertools.zip_longest(self._lines(), file))

    def _finish(self) -> None:
        if self._direct is not None:
            return
        whole = self._place.with_name(self._place.name + WHOLE)
        with outputs.writable(self.path):
            with open(whole, "wb") as file:
                file.writelines(self._lines())
                outputs.publish(file, whole, self._place)
            self._partial.unlink()
