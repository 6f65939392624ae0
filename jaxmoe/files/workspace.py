"""Workspaces: folders beside an output folder, in which it is prepared until a rename."""

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

RESULT = "result"  # in a workspace: the folder that becomes the output
ARRAYS = "arrays"  # in a workspace: the folder of the arrays that go into the result
NOTE = "progress.json"  # in a `Resumable` workspace: which parts of the work are done


def workspace_path(output: Path) -> Path:
    """The path of the workspace of `output`, a folder beside it; it need not exist.

    Raises:
        UserError: if `output` exists and is not an empty folder, or no folder can have this name.
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
    """The path of the workspace of `output`, which must not exist.

    Raises:
        UserError: as `workspace_path`, or if an interrupted run left a workspace or another run
            uses it.
    """
    workspace = workspace_path(output)
    if workspace.exists():
        with writable(output), locked(workspace):
            pass
        raise UserError(f"{workspace} is left from an interrupted run; delete it and run again.")
    return workspace


@contextlib.contextmanager
def prepared(output: Path) -> Iterator[Path]:
    """Makes a workspace; its folder `RESULT` becomes `output` at the end of the context.

    After any error the workspace is removed.

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
    """A workspace that survives its run, so that a later run resumes from its note.

    It is a context manager: within the context, no other run can use the same workspace.

    Attributes:
        output: the folder to be made.
        path: the workspace's folder.
        note: the last note that was written; empty if there is none.
    """

    def __init__(self, output: Path):
        """Finds the workspace's path.

        Raises:
            UserError: as `workspace_path`.
        """
        self.output = output
        self.path = workspace_path(output)
        self.note: dict[str, Any] = {}
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> "Resumable":
        """Reads the note of an earlier run, and locks the workspace if it exists.

        Raises:
            UserError: if another run uses the workspace, or it has no readable note.
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
        """Whether there is something to resume.

        There is not if a run was killed before it made its first array, or after its result became
        the output.
        """
        if not self.path.is_dir():
            return self.path.exists()
        left = {path.name for path in self.path.iterdir()} - {NOTE, NOTE + ".new"}
        return left != set() and (left != {ARRAYS} or any((self.path / ARRAYS).iterdir()))

    def begin(self, nbytes: int) -> None:
        """Makes an empty workspace, or empties one that holds nothing to resume.

        Args:
            nbytes: the size of the output.

        Raises:
            UserError: if the disk has less space, another run made the workspace meanwhile, or the
                file system refuses.
        """
        check_space(self.path, nbytes)
        with writable(self.output):
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
            if self._holds_work() and not self.note:  # another run was here since `__enter__`
                raise self._left()
            for path in self.path.iterdir():  # the folder itself is locked, and stays
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def write_note(self, note: dict[str, Any]) -> None:
        """Replaces the note, at once or not at all.

        What the note says is done must be in its files before. If those files are not synced, the
        note must include the `boot` during which they were written.

        Raises:
            UserError: if the file system refuses.
        """
        new = self.path / (NOTE + ".new")
        content = json.dumps({"note": note, "sha256": _digest(note)})
        with writable(self.output), open(new, "wb") as file:
            file.write(content.encode())
            publish(file, new, self.path / NOTE)
        self.note = note

    def finish(self) -> None:
        """Syncs the folder `RESULT`, makes it the output, and removes the workspace.

        Raises:
            UserError: if the file system refuses.
        """
        result = self.path / RESULT
        with writable(self.output):
            try:
                for path in (*result.rglob("*"), result):
                    sync(path)
            except OSError:
                (self.path / NOTE).unlink()  # what it says is done may be lost
                raise
            rename(result, self.output.resolve())
            shutil.rmtree(self.path)


def _read_note(file: Path) -> dict[str, Any]:
    """The note that `write_note` wrote to a file.

    Raises:
        UserError: if the file cannot be read, or its digest is wrong.
    """
    match read_json(file):
        case {"note": dict(note), "sha256": digest} if digest == _digest(note):
            return note
    raise UserError(f"{file} is damaged.")


def _digest(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note).encode()).hexdigest()


def boot() -> str:
    """The system's boot id, which changes at every restart; empty where there is none.

    Written files may be lost at a restart unless they were synced, and not before.
    """
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
