"""Checkpoints on disk, in Orbax's layout.

A checkpoint is one folder: an Orbax v1 checkpoint of the parameter tree, one Zarr array per
parameter, with the configuration in its custom metadata and the tokenizer's files beside it.
`orbax.checkpoint.v1.load` reads it without this project. A quantized matrix is two arrays, `qvalue`
and `scale`. The vision tower is a tree of its own beside the text model's. A manifest binds it all
together (see `jaxmoe.checkpoint.manifest`).

`jaxmoe.checkpoint.writer` fills them. TensorStore reads them, and not Orbax: one device's share at
a time, where Orbax holds many, and what is damaged is named.
"""

import collections
import contextlib
import dataclasses
import importlib.metadata
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxmoe.checkpoint.arrays import StoredArray, even_part
from jaxmoe.checkpoint.manifest import FORMAT, Finished, open_finished
from jaxmoe.checkpoint.tensors import BLOCK_BYTES, Format, array_shapes, main_dtype
from jaxmoe.checkpoint.workspace import prepared, workspace_of, writable
from jaxmoe.checkpoint.writer import Writer
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation_config import with_stop_ids
from jaxmoe.hf_config import from_hf, stated_dtype, to_hf, vision_from_hf
from jaxmoe.model.params import (
    ParamSpec,
    named_params,
    named_specs,
    unflatten_params,
    unpadded,
    with_shardings,
)
from jaxmoe.model.vision_params import vision_specs
from pallas_kernels.quantized import QuantizedMatrix

KEY = "jaxmoe"  # of the custom metadata
REMEDY = "make one with jaxmoe convert"
FLOATS = ("bfloat16", "float32", "float16")  # what an array that is not quantized may be in
QVALUES = {"int8": "int8", "fp8": "float8_e4m3fn", "int4": "int8"}  # dtypes by format

COMPANIONS = (  # files that travel with the weights
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)


Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def no_progress(done: int, total: int) -> None:
    """For callers that do not watch."""


def copy_companions(source: Path, target: Path) -> None:
    """Copies those of `COMPANIONS` that `source` has."""
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def save(path: str | Path, config: Llama4Config, params: dict) -> None:
    """Saves parameters that lie on a mesh; each host writes what it holds, to one file system.

    Raises:
        UserError: if `path` exists and is not empty, or cannot be written.
    """
    path, arrays = Path(path), _named_arrays(config, unpadded(config, params))
    formats = {
        name: Format(w.format, w.group_size)
        for name, (_, w) in named_params(config, params).items()
        if isinstance(w, QuantizedMatrix)
    }
    metadata = model_metadata(config, params["embed"].dtype.name, formats)
    first = jax.process_index() == 0
    workspace = workspace_of(path)
    _meet("looked")  # every host, before the first one makes it
    with prepared(path) if first else contextlib.nullcontext():
        with writable(path), Writer(workspace, alone=jax.process_count() == 1) as writer:
            if first:
                for name, array in arrays.items():
                    writer.create(name, array.shape, array.dtype, _block(array))
            _meet("created")
            for name, array in arrays.items():
                _write_shares(writer, writer.reopen(name), array)
            writer.wait()
            _meet("written")
            writer.finish(arrays, KEY, metadata)
    _meet("saved")


def _named_arrays(config: Llama4Config, params: dict) -> dict[str, jax.Array]:
    """By the names of `array_shapes`."""
    arrays = {}
    for name, (_, w) in named_params(config, params).items():
        if isinstance(w, QuantizedMatrix):
            arrays |= {f"{name}.qvalue": w.qvalue, f"{name}.scale": w.scale}
        else:
            arrays[name] = w
    return arrays


def _block(array: jax.Array) -> tuple[int, ...]:
    """What is a file: a device's share, or an even part of it."""
    share = array.sharding.shard_shape(array.shape)
    return tuple(even_part(share, array.dtype.itemsize, BLOCK_BYTES))


def _write_shares(writer: Writer, stored: StoredArray, array: jax.Array) -> None:
    """Writes what this host holds of an array, block by block; of equal shares one is written."""
    block = stored.grid.block
    for shard in array.addressable_shards:
        if shard.replica_id:
            continue
        data = np.asarray(shard.data)
        begin = [span.indices(n)[0] for span, n in zip(shard.index, array.shape, strict=True)]
        blocks = []
        for start in itertools.product(*map(range, (0,) * data.ndim, data.shape, block)):
            part = tuple(slice(i, i + n) for i, n in zip(start, block, strict=True))
            index = tuple(slice(b + s.start, b + s.stop) for b, s in zip(begin, part, strict=True))
            blocks.append((stored, index, data[part]))
        writer.write(blocks)


def _meet(name: str) -> None:
    """Waits for the other hosts."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"jaxmoe.save {name}")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's metadata says.

    Attributes:
        config: of the text model.
        formats: of the parameters that are quantized, by name.
        outer: the config.json around the text model's where the vision tower is there, else None.
        stated: the dtype that the configuration states.
    """

    found: Finished
    config: Llama4Config
    formats: dict[str, Format]
    outer: dict[str, Any] | None
    stated: Any = None

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.found.path

    def specs(self, vision: bool = False) -> dict[str, ParamSpec]:
        """Declarations of the parameters by name; with `vision`, also of a vision tower's."""
        tower = vision_from_hf(self.outer, str(self.path)) if vision and self.outer else None
        seen = vision_specs(self.config, tower) if tower is not None else {}
        return named_specs(self.config) | seen

    def shapes(self, vision: bool = False) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored arrays by name; `vision` as in `specs`."""
        return array_shapes(self.config, self.formats, self.specs(vision))

    def open_arrays(self, vision: bool = False) -> dict[str, StoredArray]:
        """Every array by dotted name, to be read in slices.

        Raises:
            UserError: if an array is missing or contradicts the metadata.
        """
        shapes = self.shapes(vision)
        return {name: self.open_array(name, shape) for name, shape in shapes.items()}

    def open_array(self, name: str, shape: tuple[int, ...]) -> StoredArray:
        """One of them; raises as `open_arrays`."""
        param, _, end = name.rpartition(".")
        is_qvalue = end == "qvalue" and param in self.formats
        return self.found.open_array(
            name, shape, (QVALUES[self.formats[param].name],) if is_qvalue else FLOATS
        )


def main_dtypes(path: str | Path) -> tuple[str, ...]:
    """The dtypes of what is not quantized, first the one to compute in where there are several.

    Raises:
        UserError: as `load`.
    """
    checkpoint = read_checkpoint(path)
    nbytes: dict[str, int] = collections.Counter()
    for name, array in checkpoint.open_arrays().items():
        if not name.endswith((".qvalue", ".scale")):
            nbytes[array.dtype.name] += array.nbytes
    first = main_dtype(nbytes, checkpoint.stated)
    return first, *sorted(nbytes.keys() - {first})


def read_checkpoint(path: str | Path) -> Checkpoint:
    """What a checkpoint is, from its metadata.

    Raises:
        UserError: if `path` is no finished checkpoint, of a newer format, or damaged.
    """
    found = open_finished(Path(path), KEY, REMEDY)
    described = found.field("config", dict)
    layers, held = described.get("num_hidden_layers"), found.count_arrays()
    if isinstance(layers, int) and layers > held:  # before there is a value for each
        raise UserError(
            f"{path} holds {held} arrays, too few for {layers} layers; convert it again."
        )
    config = from_hf(described, source=str(path))
    outer = found.field("outer", dict) if "outer" in found.metadata else None
    return Checkpoint(found, config, _formats(found, config), outer, stated_dtype(described))


def _formats(found: Finished, config: Llama4Config) -> dict[str, Format]:
    """The formats of the quantized parameters, by name."""
    specs = named_specs(config)
    stored = found.field("formats", dict) if "formats" in found.metadata else {}
    formats = {}
    for name, value in stored.items():
        match value:
            case [str(kind), int(width)] if (
                kind in QVALUES
                and name in specs
                and specs[name].quantizable
                and width > 0
                and specs[name].matrix_shape[-2] % width == 0
            ):
                formats[name] = Format(kind, width)
            case _:
                raise UserError(
                    f"{found.path} has {name!r:.80} in the format {value!r:.80}, which cannot be; "
                    "convert it again."
                )
    return formats


def read_config(path: str | Path) -> Llama4Config:
    """The configuration of a checkpoint, as `load` returns it; raises as `read_checkpoint`."""
    return with_stop_ids(read_checkpoint(path).config, path)


def load(
    path: str | Path,
    mesh: jax.sharding.Mesh,
    dtype: Any = None,
    progress: Progress = no_progress,
) -> tuple[Llama4Config, dict]:
    """Loads a checkpoint straight into the sharding that `mesh` gives each parameter.

    Each host reads the shares of its own devices, one share after the other: beyond the parameters
    themselves, memory holds one device's share of one parameter. The vision tower is not read.

    Args:
        path: a checkpoint folder.
        mesh: the devices, with the axes of `jaxmoe.mesh`.
        dtype: what to cast to while reading; None keeps the dtype of each array. Matrices that are
            stored in 8 or 4 bits stay so, with scales in float32.
        progress: called after every array.

    Returns:
        The configuration, with the tokens that end an answer by `generation_config.json` beside its
        own, and parameters as `param_specs` declares them.

    Raises:
        UserError: if the checkpoint is unfinished or damaged, or the mesh does not divide it.
    """
    checkpoint = read_checkpoint(path)
    arrays = checkpoint.open_arrays()
    leaves, structure = jax.tree.flatten(_placed(checkpoint, arrays, mesh, dtype))
    total = sum(array.nbytes for array in arrays.values())
    params, done = [], 0
    for target, array in zip(leaves, _in_order(checkpoint, arrays), strict=True):
        params.append(_load_array(array, target))
        done += array.nbytes
        progress(done, total)
    return with_stop_ids(checkpoint.config, path), structure.unflatten(params)


def abstract(path: str | Path, mesh: jax.sharding.Mesh, dtype: Any = None) -> dict:
    """The shapes, dtypes and shardings of what `load` returns; raises as `load`."""
    checkpoint = read_checkpoint(path)
    return _placed(checkpoint, checkpoint.open_arrays(), mesh, dtype)


def _placed(checkpoint: Checkpoint, arrays: dict[str, StoredArray], mesh, dtype: Any) -> dict:
    """The parameters as they will be loaded."""

    def shape(name: str, dtype: Any):
        found = arrays[name].dtype
        return jax.ShapeDtypeStruct(arrays[name].shape, found if dtype is None else dtype)

    leaves: list[Any] = []
    for name in named_specs(checkpoint.config):
        if name in checkpoint.formats:
            qvalue, scale = shape(f"{name}.qvalue", None), shape(f"{name}.scale", jnp.float32)
            format = checkpoint.formats[name].name
            leaves.append(QuantizedMatrix(qvalue, scale, format))  # pyrefly: ignore  # shapes
        else:
            leaves.append(shape(name, dtype))
    return with_shardings(checkpoint.config, unflatten_params(checkpoint.config, leaves), mesh)


def _in_order(checkpoint: Checkpoint, arrays: dict[str, StoredArray]) -> list[StoredArray]:
    """As the leaves of the parameters' tree are."""
    return [arrays[name] for name in checkpoint.shapes()]


def _load_array(array: StoredArray, target: jax.ShapeDtypeStruct) -> jax.Array:
    """The array as `target` says; what this has beyond the array is 0."""
    sharding = target.sharding
    devices_of = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(target.shape).items():
        devices_of[index or ()].append(device)
    shares = []
    for index, devices in devices_of.items():
        share = _read_share(array, index, target)
        shares += jax.block_until_ready([jax.device_put(share, device) for device in devices])
    return jax.make_array_from_single_device_arrays(target.shape, sharding, shares)


def _read_share(
    array: StoredArray, index: tuple[slice, ...], target: jax.ShapeDtypeStruct
) -> np.ndarray:
    """A slice of `target`, of which the array is the beginning and the rest 0."""
    wanted = [axis.indices(size)[:2] for axis, size in zip(index, target.shape, strict=True)]
    there = [
        slice(min(start, size), min(stop, size))
        for (start, stop), size in zip(wanted, array.shape, strict=True)
    ]
    share = array.read(there, dtype=jnp.dtype(target.dtype))
    missing = [
        (0, stop - start - held) for (start, stop), held in zip(wanted, share.shape, strict=True)
    ]
    return np.pad(share, missing) if any(map(any, missing)) else share


def model_metadata(
    config: Llama4Config,
    dtype: str,
    formats: dict[str, Format] | None = None,
    outer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What names a model: its configuration, how it is stored, and who wrote it."""
    version = importlib.metadata.version("jaxmoe")
    metadata = {"format": FORMAT, "version": version, "config": to_hf(config, dtype)}
    metadata["formats"] = {name: list(value) for name, value in (formats or {}).items()}
    return metadata | ({} if outer is None else {"outer": outer})
