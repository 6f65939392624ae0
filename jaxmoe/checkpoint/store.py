"""Checkpoints on disk, in Orbax's layout.

A checkpoint is one folder: an Orbax v1 checkpoint of the parameter tree, one Zarr array per
parameter, with the configuration in its custom metadata and the tokenizer's files beside it.
`orbax.checkpoint.v1.load` reads it without this project. A quantized matrix is two arrays, `qvalue`
and `scale`. The vision tower is a tree of its own beside the text model's.

`jaxmoe.checkpoint.writer` fills them. TensorStore reads them, and not Orbax: one device's share at
a time, where Orbax holds many, and what is damaged is named.
"""

import collections
import dataclasses
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from jaxmoe.checkpoint.arrays import nbytes_of, open_array, path_of, readable
from jaxmoe.checkpoint.tensors import Format, array_shapes, main_dtype
from jaxmoe.checkpoint.workspace import workspace_of
from jaxmoe.checkpoint.writer import MARKER, STATE, save_tree
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation_config import with_stop_ids
from jaxmoe.hf_config import from_hf, stated_dtype, to_hf, vision_from_hf
from jaxmoe.model.params import (
    ParamSpec,
    named_params,
    named_specs,
    place,
    unflatten_params,
    unpadded,
)
from jaxmoe.model.vision_params import vision_specs
from pallas_kernels.quantized import QuantizedMatrix

FORMAT = 2
KEY = "jaxmoe"  # of the custom metadata

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
    """Saves parameters that lie on a mesh; each host writes what it holds.

    Raises:
        UserError: if `path` exists and is not empty.
    """
    workspace_of(Path(path))
    formats = {
        name: Format(w.format, w.width)
        for name, (_, w) in named_params(config, params).items()
        if isinstance(w, QuantizedMatrix)
    }
    metadata = model_metadata(config, params["embed"].dtype.name, formats)
    tree = jax.tree.map(
        lambda w: {"qvalue": w.qvalue, "scale": w.scale} if isinstance(w, QuantizedMatrix) else w,
        unpadded(config, params),
        is_leaf=lambda w: isinstance(w, QuantizedMatrix),
    )
    save_tree(Path(path).resolve(), tree, KEY, metadata)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's metadata says.

    Attributes:
        config: of the text model.
        formats: of the parameters that are quantized, by name.
        outer: the config.json around the text model's where the vision tower is there, else None.
        stated: the dtype that the configuration states.
    """

    path: Path
    config: Llama4Config
    formats: dict[str, Format]
    outer: dict[str, Any] | None
    stated: Any = None

    def specs(self, vision: bool = False) -> dict[str, ParamSpec]:
        """Of the text model's parameters by name, or also of the vision tower's if it is there."""
        tower = vision_from_hf(self.outer, str(self.path)) if vision and self.outer else None
        seen = vision_specs(self.config, tower) if tower is not None else {}
        return named_specs(self.config) | seen

    def shapes(self, vision: bool = False) -> dict[str, tuple[int, ...]]:
        """Of the arrays, likewise."""
        return array_shapes(self.config, self.formats, self.specs(vision))

    def open_arrays(self, vision: bool = False) -> dict[str, ts.TensorStore]:
        """Every array by dotted name, to be read in slices.

        Raises:
            UserError: if an array is missing or contradicts the configuration.
        """
        arrays = {}
        for name, shape in self.shapes(vision).items():
            arrays[name] = open_array(self.path / STATE / name)
            if arrays[name].shape != shape:
                raise UserError(
                    f"{self.path} holds {name} with shape {arrays[name].shape}, but its config "
                    f"says {shape}; convert it again."
                )
        return arrays


def main_dtypes(path: str | Path) -> tuple[str, ...]:
    """The dtypes of what is not quantized, first the one to compute in where there are several.

    Raises:
        UserError: as `load`.
    """
    checkpoint = read_checkpoint(path)
    nbytes: dict[str, int] = collections.Counter()
    for name, array in checkpoint.open_arrays().items():
        if not name.endswith((".qvalue", ".scale")):
            nbytes[array.dtype.name] += nbytes_of(array)
    first = main_dtype(nbytes, checkpoint.stated)
    return first, *sorted(nbytes.keys() - {first})


def read_checkpoint(path: str | Path) -> Checkpoint:
    """What a checkpoint is, from its metadata.

    Raises:
        UserError: if `path` is no finished checkpoint, or of a newer format.
    """
    path = Path(path)
    metadata = read_metadata(path, KEY, "make one with scripts/convert.py")
    if metadata["format"] > FORMAT:
        raise UserError(f"{path} was written by jaxmoe {metadata['version']}; update jaxmoe.")
    formats = {name: Format(*value) for name, value in metadata.get("formats", {}).items()}
    config = from_hf(metadata["config"], source=str(path))
    stated = stated_dtype(metadata["config"])
    return Checkpoint(path, config, formats, metadata.get("outer"), stated)


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
    total = sum(map(nbytes_of, arrays.values()))
    params, done = [], 0
    for target, array in zip(leaves, _in_order(checkpoint, arrays), strict=True):
        params.append(_load_array(array, target))
        done += nbytes_of(array)
        progress(done, total)
    return with_stop_ids(checkpoint.config, path), structure.unflatten(params)


def abstract(path: str | Path, mesh: jax.sharding.Mesh, dtype: Any = None) -> dict:
    """The shapes, dtypes and shardings of what `load` returns; raises as `load`."""
    checkpoint = read_checkpoint(path)
    return _placed(checkpoint, checkpoint.open_arrays(), mesh, dtype)


def _placed(checkpoint: Checkpoint, arrays: dict[str, ts.TensorStore], mesh, dtype: Any) -> dict:
    """The parameters as they will be loaded."""

    def shape(name: str, dtype: Any):
        found = arrays[name].dtype.numpy_dtype
        return jax.ShapeDtypeStruct(arrays[name].shape, found if dtype is None else dtype)

    leaves: list[Any] = []
    for name in named_specs(checkpoint.config):
        if name in checkpoint.formats:
            qvalue, scale = shape(f"{name}.qvalue", None), shape(f"{name}.scale", jnp.float32)
            format = checkpoint.formats[name].name
            leaves.append(QuantizedMatrix(qvalue, scale, format))  # pyrefly: ignore  # shapes
        else:
            leaves.append(shape(name, dtype))
    return place(checkpoint.config, unflatten_params(checkpoint.config, leaves), mesh)


def _in_order(checkpoint: Checkpoint, arrays: dict[str, ts.TensorStore]) -> list[ts.TensorStore]:
    """As the leaves of the parameters' tree are."""
    return [arrays[name] for name in checkpoint.shapes()]


def _load_array(array: ts.TensorStore, target: jax.ShapeDtypeStruct) -> jax.Array:
    """The array as `target` says; what this has beyond the array is 0."""
    dtype, sharding = target.dtype, target.sharding
    source = ts.cast(array, ts.dtype(jnp.dtype(dtype))) if dtype != array.dtype else array
    devices_of = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(target.shape).items():
        devices_of[index or ()].append(device)
    shares = []
    for index, devices in devices_of.items():
        with readable(path_of(array)):
            share = _read_share(source, index, target.shape)
        shares += jax.block_until_ready([jax.device_put(share, device) for device in devices])
    return jax.make_array_from_single_device_arrays(target.shape, sharding, shares)


def _read_share(source: ts.TensorStore, index: tuple[slice, ...], shape: tuple[int, ...]):
    """A slice of an array of `shape`, of which `source` is the beginning and the rest 0."""
    wanted = [axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)]
    there = tuple(
        slice(min(start, size), min(stop, size))
        for (start, stop), size in zip(wanted, source.shape, strict=True)
    )
    share = source[there].read(order="C").result()
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
