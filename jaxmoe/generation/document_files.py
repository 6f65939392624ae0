"""The files of a document that is being read: a workspace beside its output, that a run resumes.

Where there are several processes, the first one writes them, all read them, and all call the same.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checkpoint.zarr.arrays import StoredArray
from jaxmoe.checkpoint.zarr.writer import Writer
from jaxmoe.files.atomic import writable
from jaxmoe.files.workspace import Resumable
from jaxmoe.generation.document_identity import check_same
from jaxmoe.processes import is_first, on_first

Array = tuple[str, Any, Any, Any, Any]  # name, shape, dtype, block and chunk


class DocumentFiles:
    """A context in which a document's arrays are written.

    Attributes:
        saved: how many tokens are on disk, for good.
        arrays: those that were begun or reopened, by name.
    """

    def __init__(self, output: Path, identity: dict[str, Any]):
        """Finds the workspace's path.

        Args:
            output: the document's folder.
            identity: of the document, which a run that goes on has to have as well.

        Raises:
            UserError: if the output exists and is not an empty folder.
        """
        self.saved = 0
        self.arrays: dict[str, StoredArray] = {}
        self._identity = identity
        self._workspace = Resumable(output)
        self._writer = Writer(self._workspace.path)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "DocumentFiles":
        """Finds what an interrupted run has saved, and locks its workspace.

        Raises:
            UserError: if another run uses the workspace, or read another document into it.
        """
        with contextlib.ExitStack() as stack:
            self.saved = on_first(lambda: self._open(stack))
            stack.enter_context(writable(self._workspace.output))
            stack.enter_context(self._writer)
            self._stack = stack.pop_all()
        return self

    def _open(self, stack: contextlib.ExitStack) -> int:
        workspace = stack.enter_context(self._workspace)
        if not workspace.note:
            return 0
        subject = f"{workspace.path} is left from an interrupted run, which read"
        check_same(workspace.note, self._identity, subject)
        return workspace.note["saved"]

    def __exit__(self, *raised: Any) -> None:
        self._stack.__exit__(*raised)

    def begin(self, nbytes: int, arrays: list[Array]) -> None:
        """Makes an empty workspace and creates arrays.

        Args:
            nbytes: the size of all.
            arrays: of each the arguments of `Writer.create`.
        """
        on_first(lambda: self._begin(nbytes, arrays))
        self._open_arrays(name for name, *_ in arrays)

    def _begin(self, nbytes: int, arrays: list[Array]) -> None:
        self._workspace.begin(nbytes)
        self._note(0)
        for array in arrays:
            self._writer.create(*array)

    def reopen(self, names: Iterable[str]) -> None:
        """Opens the arrays that an interrupted run created."""
        names = list(names)
        on_first(lambda: [self._writer.reopen(name) for name in names] and None)
        self._open_arrays(names)

    def _open_arrays(self, names: Iterable[str]) -> None:
        self.arrays = {name: self._writer.reopen(name) for name in names}

    def write(self, name: str, data: np.ndarray, first: int) -> None:
        """Writes the elements of an array's first axis from `first` on."""
        if is_first():
            place = (slice(first, first + len(data)),)
            self._writer.write([(self.arrays[name], place, np.ascontiguousarray(data))])

    def note(self, saved: int) -> None:
        """Notes that the pages of so many tokens are written, once they are."""
        on_first(lambda: self._note(saved))
        self.saved = saved

    def _note(self, saved: int) -> None:
        self._writer.wait()
        self._workspace.write_note(self._identity | {"saved": saved})

    def finish(self, key: str) -> None:
        """Makes the arrays a checkpoint at the output; `key` names its metadata."""
        self._writer.finish(self.arrays, key, self._identity)
        on_first(self._workspace.finish)
