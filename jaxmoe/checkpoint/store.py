"""Saves and loads checkpoints in Orbax's layout.

A checkpoint is one folder: an Orbax v1 checkpoint of the parameter tree, one Zarr array per
parameter, with the configuration in its custom metadata and the tokenizer's files beside it.
`orbax.checkpoint.v1.load` reads it without this project. A quantized matrix is two arrays, `qvalue`
and `scale`. A manifest lists the checksums of it all (see `jaxmoe.checkpoint.zarr.manifest`).

`zarr.writer` fills the arrays. TensorStore reads them, and not Orbax: it holds one device's share
at a time where Orbax holds many, and its errors name what is damaged.
"""

import collections
import contextlib
import dataclasses
import importlib.metadata
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from jaxmoe.checkpoint.mapping.tensors import Format, array_shapes, main_dtype
from jaxmoe.checkpoint.peft import add_adapters, read_adapter, read_adapters
from jaxmoe.checkpoint.shares import block_shape, load_array, write_shares
from jaxmoe.checkpoint.zarr.arrays import StoredArray
from jaxmoe.checkpoint.zarr.manifest import FORMAT, Finished, open_finished
from jaxmoe.checkpoint.zarr.writer import Writer
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.files.atomic import writable
from jaxmoe.files.workspace import prepared, workspace_of
from jaxmoe.generation_config import with_stop_ids
from jaxmoe.hf_config import from_hf, outer_to_hf, stated_dtype, to_hf, with_vision
from jaxmoe.model.params import (
    named_params,
    named_specs,
    unflatten_params,
    unpadded,
    with_shardings,
)
from pallas_kernels.quantized import QuantizedMatrix

KEY = "jaxmoe"  # names the metadata among Orbax's custom metadata
REMEDY = "make one with jaxmoe convert"
FLOATS = ("bfloat16", "float32", "float16")  # dtypes of arrays that are not quantized
SELECTION_BIAS = "selection_bias"  # beside Hugging Face's keys: readers without it refuse the model
QVALUES = {"int8": "int8", "fp8": "float8_e4m3fn", "int4": "int8"}  # of quantized ones, by format

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
    """Does nothing: the default of functions that take a `progress`."""


def copy_companions(source: Path, target: Path) -> None:
    """Copies the files of `COMPANIONS` that are in folder `source` to folder `target`."""
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def save(path: str | Path, config: Llama4Config, params: dict) -> None:
    """Saves parameters that lie on a mesh.

    Every host calls it and writes the shares of its own devices to one shared file system.

    Args:
        path: the checkpoint's folder.
        config: of the model.
        params: as `param_specs` declares them; rows that fill up the vocabulary are left out.

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
    _barrier("looked")  # every host looks at the path before the first one makes a folder there
    with prepared(path) if first else contextlib.nullcontext():
        with writable(path), Writer(workspace, alone=jax.process_count() == 1) as writer:
            if first:
                for name, array in arrays.items():
                    writer.create(name, array.shape, array.dtype, block_shape(array))
            _barrier("created")
            for name, array in arrays.items():
                write_shares(writer, writer.reopen(name), array)
            writer.wait()
            _barrier("written")
            writer.finish(arrays, KEY, metadata)
    _barrier("saved")


def _named_arrays(config: Llama4Config, params: dict) -> dict[str, jax.Array]:
    """The arrays to be saved, by the names that `array_shapes` gives them."""
    arrays = {}
    for name, (_, w) in named_params(config, params).items():
        if isinstance(w, QuantizedMatrix):
            arrays |= {f"{name}.qvalue": w.qvalue, f"{name}.scale": w.scale}
        else:
            arrays[name] = w
    return arrays


def _barrier(name: str) -> None:
    """Returns once all hosts have called it with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"jaxmoe.save {name}")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint of a model: what its metadata says, and its arrays.

    Attributes:
        finished: the checkpoint's folder and metadata.
        config: of the model.
        formats: the formats of the quantized parameters, by name.
        outer: the `config.json` around the text model's; None without a vision tower.
        stated: the dtype that the configuration states.
    """

    finished: Finished
    config: Llama4Config
    formats: dict[str, Format]
    outer: dict[str, Any] | None
    stated: Any = None

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return self.finished.path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the stored arrays by name."""
        return array_shapes(self.config, self.formats)

    def open_arrays(self) -> dict[str, StoredArray]:
        """Opens every array, by dotted name, to be read in slices.

        Raises:
            UserError: if an array is missing or contradicts the metadata.
        """
        return {name: self.open_array(name, shape) for name, shape in self.shapes().items()}

    def open_array(self, name: str, shape: tuple[int, ...]) -> StoredArray:
        """Opens the array of a dotted name and this shape.

        Raises:
            UserError: as `open_arrays`.
        """
        param, _, end = name.rpartition(".")
        is_qvalue = end == "qvalue" and param in self.formats
        return self.finished.open_array(
            name, shape, (QVALUES[self.formats[param].name],) if is_qvalue else FLOATS
        )


def main_dtypes(path: str | Path, text_only: bool = False) -> tuple[str, ...]:
    """The dtypes of the arrays that are not quantized; the first is the one to compute in.

    Args:
        text_only: as for `load`.

    Raises:
        UserError: as `load`.
    """
    checkpoint = read_checkpoint(path, text_only)
    nbytes: dict[str, int] = collections.Counter()
    for name, array in checkpoint.open_arrays().items():
        if not name.endswith((".qvalue", ".scale")):
            nbytes[array.dtype.name] += array.nbytes
    first = main_dtype(nbytes, checkpoint.stated)
    return first, *sorted(nbytes.keys() - {first})


def read_checkpoint(path: str | Path, text_only: bool = False) -> Checkpoint:
    """Reads a checkpoint's metadata, and no arrays.

    Args:
        text_only: as if there were no vision tower, whose description may then be wrong.

    Raises:
        UserError: if `path` is no finished checkpoint, of a newer format, or damaged.
    """
    finished = open_finished(Path(path), KEY, REMEDY)
    described = finished.field("config", dict)
    layers, arrays = described.get("num_hidden_layers"), finished.count_arrays()
    if isinstance(layers, int) and layers > arrays:  # before something is allocated for each layer
        raise UserError(
            f"{path} holds {arrays} arrays, too few for {layers} layers; convert it again."
        )
    config = _config(described, str(path))
    has_outer = "outer" in finished.metadata and not text_only
    outer = finished.field("outer", dict) if has_outer else None
    if outer is not None:
        config = with_vision(config, outer, str(path))
    return Checkpoint(finished, config, _formats(finished, config), outer, stated_dtype(described))


def _config(described: dict[str, Any], source: str) -> Llama4Config:
    """The model of the metadata's configuration, which is Hugging Face's but for one key."""
    biased = described.get(SELECTION_BIAS) is True
    plain = {key: x for key, x in described.items() if key != SELECTION_BIAS or not biased}
    return dataclasses.replace(from_hf(plain, source=source), selection_bias=biased)


def _formats(finished: Finished, config: Llama4Config) -> dict[str, Format]:
    """The formats of the quantized parameters, by name.

    Raises:
        UserError: if the metadata name an unknown parameter or an impossible format.
    """
    specs = named_specs(config)
    stored = finished.field("formats", dict) if "formats" in finished.metadata else {}
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
                    f"{finished.path} has {name!r:.80} in the format {value!r:.80}, which cannot "
                    "be; convert it again."
                )
    return formats


def read_config(path: str | Path, text_only: bool = False) -> Llama4Config:
    """The configuration of a checkpoint, as `load` returns it; arguments as for `load`.

    Raises:
        UserError: as `read_checkpoint`.
    """
    return with_stop_ids(read_checkpoint(path, text_only).config, path)


def load(
    path: str | Path,
    mesh: jax.sharding.Mesh,
    dtype: Any = None,
    progress: Progress = no_progress,
    *,
    text_only: bool = False,
    adapter: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
) -> tuple[Llama4Config, dict]:
    """Loads a checkpoint straight into the sharding that `mesh` gives each parameter.

    Each host reads the shares of its own devices, one share after the other: host memory holds one
    device's share of one parameter beyond the parameters themselves.

    Args:
        path: a checkpoint folder.
        mesh: the devices, with the axes of `jaxmoe.mesh`.
        dtype: what to cast to while reading; None keeps the dtype of each array. Matrices that are
            stored in 8 or 4 bits stay so, with scales in float32.
        progress: called after every array with the bytes done and the bytes in all.
        text_only: leaves a vision tower out, and does not look at its description.
        adapter: a folder that PEFT or a run with `adapter` saved, whose matrices stand beside those
            of the checkpoint; `jaxmoe.merge_adapters` adds them up.
        adapters: folders of several adapters by name, of which each request of `jaxmoe.generate`
            chooses one or none.

    Returns:
        The configuration, with the stop tokens of `generation_config.json` added to its own, and
        the parameters as `param_specs` declares them.

    Raises:
        UserError: if the checkpoint or an adapter is unfinished, damaged or of another model, the
            mesh does not divide a parameter, or there are `adapter` and `adapters`.
    """
    checkpoint = read_checkpoint(path, text_only)
    if adapter is not None and adapters:
        raise UserError("give one adapter for all requests, or several by name, but not both.")
    found = None
    if adapter is not None:
        found = read_adapter(adapter, checkpoint.config, text_only=text_only)
    several = read_adapters(adapters or {}, checkpoint.config, text_only=text_only)
    arrays = checkpoint.open_arrays()
    leaves, structure = jax.tree.flatten(_placed(checkpoint, arrays, mesh, dtype))
    total = sum(array.nbytes for array in arrays.values())
    params, done = [], 0
    for target, array in zip(leaves, _in_order(checkpoint, arrays), strict=True):
        params.append(load_array(array, target))
        done += array.nbytes
        progress(done, total)
    loaded = structure.unflatten(params)
    if found is not None:
        loaded = found.added_to(loaded, mesh, dtype or loaded["embed"].dtype)
    if several:
        dtype = dtype or loaded["embed"].dtype
        loaded = add_adapters(checkpoint.config, several, loaded, mesh, dtype)
    return with_stop_ids(checkpoint.config, path), loaded


def abstract(
    path: str | Path, mesh: jax.sharding.Mesh, dtype: Any = None, text_only: bool = False
) -> tuple[Llama4Config, dict]:
    """What `load` returns, the parameters as shapes, dtypes and shardings without numbers.

    Raises:
        UserError: as `load`.
    """
    checkpoint = read_checkpoint(path, text_only)
    params = _placed(checkpoint, checkpoint.open_arrays(), mesh, dtype)
    return with_stop_ids(checkpoint.config, path), params


def _placed(checkpoint: Checkpoint, arrays: dict[str, StoredArray], mesh, dtype: Any) -> dict:
    """The shapes, dtypes and shardings of the parameters to be loaded."""

    def shape(name: str, dtype: Any):
        stored = arrays[name].dtype
        return jax.ShapeDtypeStruct(arrays[name].shape, stored if dtype is None else dtype)

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
    """The arrays in the order of the leaves of the parameters' tree."""
    return [arrays[name] for name in checkpoint.shapes()]


def model_metadata(
    config: Llama4Config,
    dtype: str,
    formats: dict[str, Format] | None = None,
    outer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The metadata of a model's checkpoint: its configuration, its formats, and this version.

    Args:
        config: of the model.
        dtype: the one that the model as a whole counts as.
        formats: the formats of the quantized parameters, by name.
        outer: the `config.json` around the text model's, with a vision tower; default: one made of
            `config`.
    """
    outer = outer_to_hf(config) if outer is None else outer
    version = importlib.metadata.version("jaxmoe")
    described = to_hf(config, dtype) | ({SELECTION_BIAS: True} if config.selection_bias else {})
    metadata: dict[str, Any] = {"format": FORMAT, "version": version, "config": described}
    metadata["formats"] = {name: list(value) for name, value in (formats or {}).items()}
    return metadata | ({} if outer is None else {"outer": outer})
