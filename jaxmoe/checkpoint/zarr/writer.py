"""Fills a checkpoint's arrays block by block, in bounded memory.

Why TensorStore writes the arrays and not Orbax: Orbax takes whole arrays, and one of a Maverick
layer's experts is 10 GB. Orbax's layout without OCDBT is a plain Zarr array in
`state/<dotted name>`, so `Writer` fills such arrays block by block, lets Orbax write a tree of
placeholders, and puts the arrays in their place. All of it happens beside the output under another
name; before the last rename there is nothing that Orbax or `load` would take for a checkpoint.
"""

import collections
import contextlib
import itertools
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from jaxmoe.checkpoint.zarr import checksums
from jaxmoe.checkpoint.zarr.arrays import (
    StoredArray,
    create_array,
    open_array,
    readable,
    reason,
    writes,
)
from jaxmoe.checkpoint.zarr.manifest import MARKER, STATE, write_manifest
from jaxmoe.errors import UserError
from jaxmoe.files.workspace import ARRAYS, RESULT

COMMITTED = "commit_success.txt"  # Orbax's own; only that it exists says something
IN_FLIGHT = 2  # calls of `Writer.write` whose blocks are being written

Index = tuple[slice, ...]


class _Begun(NamedTuple):
    """A block that is being written."""

    array: StoredArray
    index: Index
    done: ts.WriteFutures


class Writer:
    """Writes a checkpoint's arrays block by block, then makes it a checkpoint.

    While blocks are written the next are read: memory holds those of `IN_FLIGHT` calls and of the
    next, and TensorStore's encoded copies. A context: at its end nothing is being written any more.
    """

    def __init__(self, workspace: Path, synced: bool = True, alone: bool = True):
        """Begins nothing yet.

        Args:
            workspace: the folder of arrays and result.
            synced: what is written survives a loss of power at once; else once it is synced.
            alone: no other process writes blocks of the same arrays.
        """
        self._arrays = workspace / ARRAYS
        self._result = workspace / RESULT
        self._synced = synced
        self._alone = alone
        self._pending: collections.deque[list[_Begun]] = collections.deque()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for begun in itertools.chain(*self._pending):
            begun.done.exception()  # waits, raises nothing

    def create(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        block: tuple[int, ...],
        chunk: tuple[int, ...] | None = None,
    ) -> StoredArray:
        """A new array, to be written in aligned blocks; see `create_array`."""
        return create_array(self._arrays / name, shape, dtype, block, chunk, synced=self._synced)

    def reopen(self, name: str) -> StoredArray:
        """An array that an interrupted run created, perhaps in the middle of `finish`.

        Raises:
            UserError: if it is missing or damaged.
        """
        path = self._arrays / name
        if not path.exists() and (self._result / STATE / name).exists():
            (self._result / STATE / name).rename(path)
        with readable(path):
            listed = (path / checksums.CHECKSUMS).read_bytes()
        return open_array(path, listed, synced=self._synced)

    def write(self, blocks: Iterable[tuple[StoredArray, Index, np.ndarray]]) -> None:
        """Starts writing blocks of arrays, once fewer than `IN_FLIGHT` calls are being done.

        Raises:
            UserError: if the file system refuses, as when the disk is full.
        """
        self._wait(IN_FLIGHT - 1)
        self._pending.append([])
        for array, index, data in blocks:
            done = array.tensor[index].write(data, can_reference_source_data_indefinitely=True)
            self._pending[-1].append(_Begun(array, index, done))

    def wait(self) -> None:
        """Returns once all that was written is in its files, and its checksums in theirs."""
        self._wait(0)

    def _wait(self, allowed: int) -> None:
        """Returns once at most so many calls are being done."""
        while len(self._pending) > allowed:
            for array, index, done in self._pending[0]:
                with writes(array.path):
                    done.result()
                    if self._alone:
                        checksums.record(array.path, array.grid, index, self._synced)
            self._pending.popleft()

    def finish(self, names: Iterable[str], key: str, metadata: dict[str, Any]) -> None:
        """Makes the arrays of these names an Orbax checkpoint, in `RESULT` of the workspace.

        Where other processes write the same arrays, all of them call it once all have written:
        Orbax saves together, and the first process does the rest.

        Args:
            key: of the custom metadata.
        """
        self.wait()
        names = list(names)
        first = self._alone or jax.process_index() == 0
        if first:
            self._gather(names)
        save_tree(self._result, nested(names), key, metadata)
        if not first:
            return
        _forget_when_and_where(self._result)
        for name in names:
            shutil.rmtree(self._result / STATE / name)
            (self._arrays / name).rename(self._result / STATE / name)
        write_manifest(self._result, names)

    def _gather(self, names: list[str]) -> None:
        """Every array is in its place, and has all its checksums."""
        for name in names:
            array = self.reopen(name)
            if not self._alone:
                checksums.record(array.path, array.grid, (), self._synced)


def _forget_when_and_where(path: Path) -> None:
    """Makes equal checkpoints equal to the byte: Orbax notes the time, and the workspace's name."""
    marker = json.loads((path / MARKER).read_text())
    for key in ("init_timestamp_nsecs", "commit_timestamp_nsecs"):
        marker[key] = 0
    (path / MARKER).write_text(json.dumps(marker))
    (path / COMMITTED).write_text("Checkpoint commit was successful")


def nested(names: Iterable[str]) -> dict[str, Any]:
    """Placeholders in the tree that dotted names spell; numbers are places in lists."""
    tree: dict[str, Any] = {}
    for name in names:
        *outer, last = name.split(".")
        inner = tree
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = np.zeros((), np.int8)
    return _with_lists(tree)


def _with_lists(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    values = {key: _with_lists(value) for key, value in tree.items()}
    if all(key.isdigit() for key in values):
        return [values[key] for key in sorted(values, key=int)]
    return values


def save_tree(path: Path, tree: Any, key: str, metadata: dict[str, Any]) -> None:
    """Lets Orbax save arrays, each as a plain Zarr array, with custom metadata.

    Raises:
        UserError: if the file system refuses.
    """
    context = ocp.Context()
    context.array_options.saving.use_ocdbt = False  # plain arrays: see the module's docstring
    with context, orbax_writes(path):
        ocp.save(str(path), tree, custom_metadata={key: metadata}, overwrite=path.exists())


@contextlib.contextmanager
def orbax_writes(path: Path) -> Iterator[None]:
    """Turns what the file system refuses Orbax into a UserError."""
    try:
        with quiet_orbax():
            yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    except ValueError as error:
        why = reason(error).rpartition(": ")[2]  # after what failed, and in which file of Orbax's
        raise UserError(f"{path} cannot be written: {why}.") from error


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Orbax warns that plain Zarr arrays are unusual, and logs what it raises, thread by thread."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
