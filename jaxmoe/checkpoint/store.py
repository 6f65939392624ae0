"""Checkpoints on disk, in Orbax's layout; the only module that knows TensorStore and the layout.

A checkpoint is one folder: an Orbax v1 checkpoint of the parameter tree, one Zarr array per
parameter, with the configuration in its custom metadata and the tokenizer's files beside it.
`orbax.checkpoint.v1.load` reads it without this project.

Why TensorStore writes the arrays and not Orbax: Orbax takes whole arrays, and the experts of one
Maverick layer are 10 GB. Orbax's layout without OCDBT is a plain Zarr array in
`state/<dotted name>`, so `Writer` fills such arrays block by block, lets Orbax write a tree of
placeholders, and puts the arrays in their place. All of it happens beside the output under another
name; before the last rename there is nothing that Orbax or `load` would take for a checkpoint.
TensorStore reads them too: one device's share at a time, where Orbax holds many, and what is
damaged is named.
"""

import collections
import contextlib
import importlib.metadata
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.hf_config import from_hf, to_hf
from jaxmoe.model.params import abstract_params, map_specs, named_specs, param_specs

FORMAT = 1
KEY = "jaxmoe"  # of the custom metadata
STATE = "state"  # the folder that Orbax gives to the tree of `ocp.save`
MARKER = "_CHECKPOINT_METADATA"  # Orbax's own file in every finished checkpoint
RESULT = "result"  # in a workspace: what becomes the output
CHUNK_BYTES = 2**20  # read at once: less than any device's share of a large parameter

COMPANIONS = (  # files that travel with the weights
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def no_progress(done: int, total: int) -> None:
    """For callers that do not watch."""


def workspace_path(output: Path) -> Path:
    """The folder beside `output` where it is prepared.

    Raises:
        UserError: if `output` exists and is not an empty folder.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty; choose another output or delete it.")
    return output.resolve().with_name(output.resolve().name + ".partial")


def workspace_of(output: Path) -> Path:
    """The same, where no earlier run may have left one.

    Raises:
        UserError: as `workspace_path`, or if an earlier run was interrupted.
    """
    workspace = workspace_path(output)
    if workspace.exists():
        raise UserError(f"{workspace} is left from an interrupted run; delete it and run again.")
    return workspace


@contextlib.contextmanager
def prepared(output: Path) -> Iterator[Path]:
    """A workspace whose `RESULT` becomes `output` at the end; on any error all of it vanishes.

    Raises:
        UserError: as `workspace_of`, or if the file system refuses.
    """
    workspace = workspace_of(output)
    with writable(output):
        workspace.mkdir(parents=True)
    try:
        with writable(output):
            yield workspace
            (workspace / RESULT).rename(output.resolve())
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def check_space(folder: Path, nbytes: int) -> None:
    """Raises a UserError if the disk that a folder is on, or will be, has not so much left."""
    free = shutil.disk_usage(next(path for path in folder.parents if path.exists())).free
    if nbytes > free:
        raise UserError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, but {nbytes / 1e9:.1f} GB are needed; "
            "free some space or choose another output."
        )


def copy_companions(source: Path, target: Path) -> None:
    """Copies those of `COMPANIONS` that `source` has."""
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


class Writer:
    """Writes a checkpoint's arrays block by block, then makes it a checkpoint.

    While one block is written the next may be read: memory holds two, and TensorStore's encoded
    copy of one. A context: at its end nothing is being written any more.
    """

    def __init__(self, workspace: Path):
        self._arrays = workspace / "arrays"
        self._result = workspace / RESULT
        self._pending: list[tuple[Path, ts.WriteFutures]] = []

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for _path, done in self._pending:
            done.exception()  # waits, raises nothing

    def create(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        block: tuple[int, ...],
        chunk: tuple[int, ...] | None = None,
    ):
        """A new array of `shape`, to be written in aligned blocks of shape `block`.

        Args:
            chunk: what is read at once; default: about `CHUNK_BYTES`.
        """
        metadata = _zarr_metadata(shape, dtype, block, chunk)
        spec = {**_spec(self._arrays / name), "create": True, "metadata": metadata}
        return ts.open(spec).result()

    def reopen(self, name: str) -> ts.TensorStore:
        """An array that an interrupted run created, perhaps in the middle of `finish_tree`."""
        if not (self._arrays / name).exists() and (self._result / STATE / name).exists():
            (self._result / STATE / name).rename(self._arrays / name)
        return open_array(self._arrays / name)

    def write(self, blocks: list[tuple[ts.TensorStore, tuple[slice, ...], np.ndarray]]) -> None:
        """Starts writing blocks of arrays, once the blocks of the last call are on disk.

        Raises:
            UserError: if the file system refuses, as when the disk is full.
        """
        self.wait()
        for array, index, data in blocks:
            done = array[index].write(data, can_reference_source_data_indefinitely=True)
            self._pending.append((_path(array), done))

    def wait(self) -> None:
        """Returns once all that was written is on disk."""
        while self._pending:
            path, done = self._pending[0]
            try:
                done.result()
            except ValueError as error:
                raise UserError(f"{path} cannot be written: {_reason(error)}.") from error
            del self._pending[0]

    def finish(self, config: Llama4Config, dtype: str, sources: list[dict[str, Any]]) -> None:
        """Makes the arrays a model's checkpoint, in `RESULT` of the workspace."""
        placeholders = map_specs(lambda _: np.zeros((), np.int8), param_specs(config))
        metadata = model_metadata(config, dtype) | {"sources": sources}
        self.finish_tree(placeholders, list(named_specs(config)), KEY, metadata)

    def finish_tree(self, placeholders: Any, names: list[str], key: str, metadata: dict) -> None:
        """Makes the arrays of these names an Orbax checkpoint, in `RESULT` of the workspace."""
        self.wait()
        _save(self._result, placeholders, key, metadata)
        for name in names:
            shutil.rmtree(self._result / STATE / name)
            (self._arrays / name).rename(self._result / STATE / name)


def save(path: str | Path, config: Llama4Config, params: dict) -> None:
    """Saves parameters that lie on a mesh; each host writes what it holds.

    Raises:
        UserError: if `path` exists and is not empty.
    """
    workspace_of(Path(path))
    dtype = jax.tree.leaves(params)[0].dtype.name
    _save(Path(path).resolve(), params, KEY, model_metadata(config, dtype))


def read_config(path: str | Path) -> Llama4Config:
    """The configuration of a checkpoint.

    Raises:
        UserError: if `path` is no finished checkpoint, or of a newer format.
    """
    path = Path(path)
    metadata = read_metadata(path, KEY, "make one with scripts/convert.py")
    if metadata["format"] > FORMAT:
        raise UserError(f"{path} was written by jaxmoe {metadata['version']}; update jaxmoe.")
    return from_hf(metadata["config"], source=str(path))


def open_arrays(path: str | Path) -> tuple[Llama4Config, dict[str, ts.TensorStore]]:
    """The configuration and every parameter's array by dotted name, to be read in slices.

    Raises:
        UserError: as `read_config`, or if an array is missing or contradicts the configuration.
    """
    path = Path(path)
    config = read_config(path)
    arrays = {}
    for name, spec in named_specs(config).items():
        arrays[name] = open_array(path / STATE / name)
        if arrays[name].shape != spec.shape:
            raise UserError(
                f"{path} holds {name} with shape {arrays[name].shape}, but its config says "
                f"{spec.shape}; convert it again."
            )
    return config, arrays


def open_array(path: Path) -> ts.TensorStore:
    """One array, to be read in slices.

    Raises:
        UserError: if it is missing or damaged.
    """
    with _readable(path):
        return ts.open(_spec(path.resolve())).result()


def load(
    path: str | Path,
    mesh: jax.sharding.Mesh,
    dtype: Any = None,
    progress: Progress = no_progress,
) -> tuple[Llama4Config, dict]:
    """Loads a checkpoint straight into the sharding that `mesh` gives each parameter.

    Each host reads the shares of its own devices, one share after the other: beyond the parameters
    themselves, memory holds one device's share of one parameter.

    Args:
        path: a checkpoint folder.
        mesh: the devices, with the axes of `jaxmoe.mesh`.
        dtype: what to cast to while reading; None keeps the dtype of each array.
        progress: called after every parameter.

    Returns:
        The configuration, and parameters as `param_specs` declares them.

    Raises:
        UserError: if the checkpoint is unfinished or damaged, or the mesh does not divide it.
    """
    config, arrays = open_arrays(path)
    targets, structure = jax.tree.flatten(abstract_params(config, mesh))
    total = sum(array.size * array.dtype.numpy_dtype.itemsize for array in arrays.values())
    params, done = [], 0
    for target, array in zip(targets, arrays.values(), strict=True):
        params.append(_load_array(array, target.sharding, dtype))
        done += array.size * array.dtype.numpy_dtype.itemsize
        progress(done, total)
    return config, structure.unflatten(params)


def _load_array(array: ts.TensorStore, sharding: jax.sharding.Sharding, dtype: Any) -> jax.Array:
    source = array if dtype is None else ts.cast(array, ts.dtype(jnp.dtype(dtype)))
    devices_of = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(array.shape).items():
        devices_of[index].append(device)
    shares = []
    for index, devices in devices_of.items():
        with _readable(_path(array)):
            share = source[index].read(order="C").result()
        shares += jax.block_until_ready([jax.device_put(share, device) for device in devices])
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shares)


def read_slice(
    array: ts.TensorStore, index: tuple[slice, ...], axes: tuple[int, ...] | None = None
) -> np.ndarray:
    """A slice of a stored array, its axes reordered as by `np.transpose` if given, contiguous.

    Raises:
        UserError: if a part of it is missing or damaged.
    """
    with _readable(_path(array)):
        part = array[index]
        part = part if axes is None else part.transpose(axes)
        return part.read(order="C").result()


def _path(array: ts.TensorStore) -> Path:
    assert array.kvstore is not None  # only arrays that are computed have none
    return Path(array.kvstore.path)


def _spec(path: Path) -> dict[str, Any]:
    """Which array; data that is missing is an error, never read as zeros."""
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }


def _zarr_metadata(
    shape: tuple[int, ...],
    dtype: np.dtype,
    block: tuple[int, ...],
    chunk: tuple[int, ...] | None = None,
) -> dict:
    """One file per block, inside it chunks with a checksum each, so that any part can be read."""
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    codecs = [little_endian, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": chunk or _chunk_shape(block, dtype.itemsize),
        "codecs": codecs,
        "index_codecs": codecs,
    }
    return {
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": block}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def _chunk_shape(block: tuple[int, ...], itemsize: int) -> list[int]:
    """Halves the largest even axis until a chunk has at most `CHUNK_BYTES`."""
    chunk = list(block)
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        even = [size for size in chunk if size % 2 == 0]
        if not even:
            break
        chunk[chunk.index(max(even))] //= 2
    return chunk


def model_metadata(config: Llama4Config, dtype: str) -> dict[str, Any]:
    """What names a model: its configuration, and who wrote it."""
    version = importlib.metadata.version("jaxmoe")
    return {"format": FORMAT, "version": version, "config": to_hf(config, dtype)}


def _save(path: Path, tree: Any, key: str, metadata: dict[str, Any]) -> None:
    context = ocp.Context()
    context.array_options.saving.use_ocdbt = False  # plain arrays: see the module's docstring
    with context, _quiet():
        ocp.save(str(path), tree, custom_metadata={key: metadata}, overwrite=path.exists())


def read_metadata(path: Path, key: str, remedy: str) -> dict[str, Any]:
    """What was saved with a checkpoint under `key`; Orbax would open every array to give it.

    Raises:
        UserError: with the `remedy`, if `path` is no finished checkpoint with such metadata.
    """
    try:
        return json.loads((path / MARKER).read_text())["custom_metadata"][key]
    except OSError:
        raise UserError(f"{path} is no finished checkpoint; {remedy}.") from None
    except (KeyError, TypeError):
        raise UserError(f"{path} is no checkpoint of this kind; {remedy}.") from None
    except ValueError as error:
        raise UserError(f"{path / MARKER} is no JSON ({error}); {remedy}.") from None


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turns what the file system refuses into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns TensorStore's errors into a UserError; running out of memory stays what it is."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path} is damaged: {_reason(error)}; make it again.") from error


def _reason(error: Exception) -> str:
    """The first line of a library's message, without its appended details."""
    return str(error).splitlines()[0].partition(" [")[0].rstrip(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax warns that a checkpoint of plain Zarr arrays is unusual."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
