"""Where outputs are prepared: beside them, under another name, until a rename makes them whole."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.files.atomic import check_space, locked, publish, rename, sync, writable
from jaxmoe.parsing import read_json

RESULT = "result"  # in a workspace: what becomes the output
ARRAYS = "arrays"  # in a workspace: what the result is put together from
NOTE = "progress.json"  # in the workspace of a job that goes on where it was killed


def workspace_path(output: Path) -> Path:
    """The folder beside `output` where it is prepared.

    Raises:
        UserError: if `output` exists and is not an empty folder, or can be no name of one.
    """
    try:
        workspace = output.resolve().with_name(output.resolve().name + ".partial")
        taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
        workspace.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, or links in a circle
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{str(output)!r:.300} cannot be written: {reason}.") from None
    if taken:
        raise UserError(f"{output} exists and is not empty; choose another output or delete it.")
    return workspace


def workspace_of(output: Path) -> Path:
    """The same, where no earlier run may have left one.

    Raises:
        UserError: as `workspace_path`, or if an earlier run was interrupted or is going on.
    """
    workspace = workspace_path(output)
    if workspace.exists():
        with writable(output), locked(workspace):
            pass
        raise UserError(f"{workspace} is left from an interrupted run; delete it and run again.")
    return workspace


@contextlib.contextmanager
def prepared(output: Path) -> Iterator[Path]:
    """A workspace whose `RESULT` becomes `output` at the end; on any error all of it vanishes.

    Raises:
        UserError: as `workspace_of`, or if the file system refuses.
    """
    workspace = workspace_of(output)
    with contextlib.ExitStack() as stack:
        with writable(output):
            workspace.mkdir(parents=True)
            stack.enter_context(locked(workspace))
        stack.callback(shutil.rmtree, workspace, ignore_errors=True)
        with writable(output):
            yield workspace
            rename(workspace / RESULT, output.resolve())


class Resumable:
    """A workspace that outlives its run: what is noted there need not be done again.

    A context: within it, no other run can take the same workspace.

    Attributes:
        path: the workspace.
        note: what was noted last; empty at first.
    """

    def __init__(self, output: Path):
        """Raises as `workspace_path`."""
        self.output = output
        self.path = workspace_path(output)
        self.note: dict[str, Any] = {}
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> "Resumable":
        """Finds what an earlier run noted.

        Raises:
            UserError: if the workspace is that of something else, or of a run that is going on.
        """
        with writable(self.output):
            if self.path.exists():
                self._take()
            holds_work = self._holds_work()
        if not holds_work:
            return self
        try:
            self.note = _read_note(self.path / NOTE)
        except UserError:
            self._lock.close()
            raise self._left() from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _left(self) -> UserError:
        return UserError(f"{self.path} is left from an interrupted run; delete it and run again.")

    def _take(self) -> None:
        """Locks the workspace until the context ends."""
        self._lock.close()
        self._lock.enter_context(locked(self.path))

    def _holds_work(self) -> bool:
        """Not if a run was killed before its first array, or once its result had its place."""
        if not self.path.is_dir():
            return self.path.exists()
        left = {path.name for path in self.path.iterdir()} - {NOTE, NOTE + ".new"}
        return left != set() and (left != {ARRAYS} or any((self.path / ARRAYS).iterdir()))

    def begin(self, nbytes: int) -> None:
        """Makes an empty workspace, also of one whose note is known to be of no use.

        Raises:
            UserError: if another run was faster, or the disk has not so much left, or refuses.
        """
        check_space(self.path, nbytes)
        with writable(self.output):
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
            if self._holds_work() and not self.note:  # it is not what was found at first
                raise self._left()
            for path in self.path.iterdir():  # the folder itself is locked, and stays
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def write_note(self, note: dict[str, Any]) -> None:
        """Replaces the note, at once or not at all.

        Before it, what it tells must be in its files; if it is not synced, the note has to say
        since which `boot`.
        """
        new = self.path / (NOTE + ".new")
        content = json.dumps({"note": note, "sha256": _digest(note)})
        with writable(self.output), open(new, "wb") as file:
            file.write(content.encode())
            publish(file, new, self.path / NOTE)
        self.note = note

    def finish(self) -> None:
        """`RESULT`, all of it on disk, becomes the output, and the workspace vanishes."""
        result = self.path / RESULT
        with writable(self.output):
            try:
                for path in (*result.rglob("*"), result):
                    sync(path)
            except OSError:
                (self.path / NOTE).unlink()  # what it tells is not true
                raise
            rename(result, self.output.resolve())
            shutil.rmtree(self.path)


def _read_note(file: Path) -> dict[str, Any]:
    """What `write_note` wrote.

    Raises:
        UserError: if the file holds something else.
    """
    match read_json(file):
        case {"note": dict(note), "sha256": digest} if digest == _digest(note):
            return note
    raise UserError(f"{file} is damaged.")


def _digest(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note).encode()).hexdigest()


def boot() -> str:
    """Names the time since the system started, in which what was written is not lost."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
