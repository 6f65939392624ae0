"""Writes a checkpoint's arrays block by block, in bounded memory.

Orbax itself takes whole arrays, and one of a Maverick layer's experts is 10 GB. Its layout without
OCDBT is a plain Zarr array in `state/<dotted name>`. So `Writer` fills such arrays through
TensorStore, lets Orbax save a tree of placeholders, and moves the arrays to the placeholders'
places. All of it happens in a workspace; before its last rename there is nothing that Orbax or
`load` would take for a checkpoint.
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

COMMITTED = "commit_success.txt"  # Orbax's own; its content means nothing
IN_FLIGHT = 2  # calls of `Writer.write` that may be unfinished at once

Index = tuple[slice, ...]


class _Begun(NamedTuple):
    """A block that is being written."""

    array: StoredArray
    index: Index
    done: ts.WriteFutures


class Writer:
    """Writes arrays block by block, then makes them a checkpoint.

    Writing goes on in the background while the caller reads the next blocks: memory holds the
    blocks of `IN_FLIGHT` calls and of the next, and TensorStore's encoded copies. It is a context
    manager, which waits at its end until nothing is being written any more.
    """

    def __init__(self, workspace: Path, synced: bool = True, alone: bool = True):
        """Prepares a writer; nothing is written yet.

        Args:
            workspace: the folder for the arrays and the result.
            synced: whether every write survives a loss of power; if not, the caller syncs the files
                before it relies on them.
            alone: whether no other process writes blocks of the same arrays.
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
            begun.done.exception()  # waits without raising

    def create(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        block: tuple[int, ...],
        chunk: tuple[int, ...] | None = None,
    ) -> StoredArray:
        """Creates an array, to be written in aligned blocks; see `create_array`."""
        return create_array(self._arrays / name, shape, dtype, block, chunk, synced=self._synced)

    def reopen(self, name: str) -> StoredArray:
        """Opens an array that an earlier run created, which may have been killed in `finish`.

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
        """Starts writing some blocks; waits first if `IN_FLIGHT` calls are unfinished.

        Args:
            blocks: of each the array, the slice of it, and the numbers, which must not change until
                they are written.

        Raises:
            UserError: if an earlier block cannot be written, as when the disk is full.
        """
        self._wait(IN_FLIGHT - 1)
        self._pending.append([])
        for array, index, data in blocks:
            done = array.tensor[index].write(data, can_reference_source_data_indefinitely=True)
            self._pending[-1].append(_Begun(array, index, done))

    def wait(self) -> None:
        """Returns once all blocks, and their checksums, are in their files.

        Raises:
            UserError: if a block cannot be written.
        """
        self._wait(0)

    def _wait(self, allowed: int) -> None:
        """Returns once at most `allowed` calls of `write` are unfinished."""
        while len(self._pending) > allowed:
            for array, index, done in self._pending[0]:
                with writes(array.path):
                    done.result()
                    if self._alone:
                        checksums.record(array.path, array.grid, index, self._synced)
            self._pending.popleft()

    def finish(self, names: Iterable[str], key: str, metadata: dict[str, Any]) -> None:
        """Makes arrays an Orbax checkpoint with a manifest, the folder `RESULT` of the workspace.

        Several processes call it together, once all have written what they write: they save the
        placeholders together, and the first process does the rest.

        Args:
            names: the dotted names of the arrays.
            key: names the metadata among Orbax's custom metadata.
            metadata: what JSON can hold.

        Raises:
            UserError: if the file system refuses.
        """
        self.wait()
        names = list(names)
        first = jax.process_index() == 0
        if first:
            self._complete(names)
        save_tree(self._result, nested(names), key, metadata)
        if not first:
            return
        _remove_time_and_path(self._result)
        for name in names:
            shutil.rmtree(self._result / STATE / name)
            (self._arrays / name).rename(self._result / STATE / name)
        write_manifest(self._result, names)

    def _complete(self, names: list[str]) -> None:
        """Returns arrays that a killed `finish` moved away, and writes checksums still missing."""
        for name in names:
            array = self.reopen(name)
            if not self._alone:
                checksums.record(array.path, array.grid, (), self._synced)


def _remove_time_and_path(path: Path) -> None:
    """Makes equal checkpoints equal to the byte: Orbax writes the time and the workspace's path."""
    marker = json.loads((path / MARKER).read_text())
    for key in ("init_timestamp_nsecs", "commit_timestamp_nsecs"):
        marker[key] = 0
    (path / MARKER).write_text(json.dumps(marker))
    (path / COMMITTED).write_text("Checkpoint commit was successful")


def nested(names: Iterable[str]) -> dict[str, Any]:
    """A tree of placeholders, int8 scalars, with a leaf for every dotted name.

    Numbers in names are indices of lists.
    """
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
    """Saves a tree of arrays with Orbax, each as a plain Zarr array.

    Args:
        path: the checkpoint's folder; one that exists is replaced.
        tree: the arrays.
        key: names the metadata among Orbax's custom metadata.
        metadata: what JSON can hold.

    Raises:
        UserError: if the file system refuses.
    """
    context = ocp.Context()
    context.array_options.saving.use_ocdbt = False  # plain arrays: see the module's docstring
    with context, orbax_writes(path):
        ocp.save(str(path), tree, custom_metadata={key: metadata}, overwrite=path.exists())


@contextlib.contextmanager
def orbax_writes(path: Path) -> Iterator[None]:
    """Turns the errors that Orbax raises while it writes `path` into a UserError."""
    try:
        with quiet_orbax():
            yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    except ValueError as error:
        why = reason(error).rpartition(": ")[2]  # without the file and the call in Orbax
        raise UserError(f"{path} cannot be written: {why}.") from error


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences Orbax's log within the context.

    Orbax warns that plain Zarr arrays are unusual, and logs every exception in each of its threads
    before it raises it.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
