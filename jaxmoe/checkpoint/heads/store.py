"""Heads on disk: an Orbax checkpoint with the head's numbers among its metadata."""

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from jaxmoe import mesh as meshes
from jaxmoe.checkpoint.heads.layout import TOKEN_IDS, named_head_specs
from jaxmoe.checkpoint.shares import load_array
from jaxmoe.checkpoint.store import FLOATS
from jaxmoe.checkpoint.zarr.manifest import FORMAT, Finished, open_finished
from jaxmoe.config import Llama4Config
from jaxmoe.eagle_config import EagleConfig, check_target
from jaxmoe.errors import UserError
from jaxmoe.fields import read_fields
from jaxmoe.model.eagle import abstract_eagle

KEY = "jaxmoe_head"  # names the metadata among Orbax's custom metadata
REMEDY = "make one with jaxmoe convert HEAD OUTPUT --target CHECKPOINT"


class Head(NamedTuple):
    """A head on a mesh.

    Attributes:
        config: its numbers.
        params: as `jaxmoe.model.eagle.eagle_specs` declares them.
        token_ids: the target's id of each token of the draft vocabulary, ascending.
    """

    config: EagleConfig
    params: dict
    token_ids: Int[Array, "G"]


def head_metadata(config: EagleConfig) -> dict[str, Any]:
    """What a head's checkpoint says of it."""
    version = importlib.metadata.version("jaxmoe")
    return {"format": FORMAT, "version": version, "head": dataclasses.asdict(config)}


def read_head_config(path: str | Path) -> EagleConfig:
    """The numbers of a head's checkpoint.

    Raises:
        UserError: if `path` is no finished checkpoint of a head, of a newer format, or damaged.
    """
    return _open(Path(path))[1]


def check_head(path: str | Path, target: Llama4Config) -> None:
    """Raises a UserError if a head's checkpoint cannot be used for a target; reads no array."""
    check_target(read_head_config(path), target, str(path))


def _open(path: Path) -> tuple[Finished, EagleConfig]:
    finished = open_finished(path, KEY, REMEDY)
    return finished, read_fields(EagleConfig, finished.field("head", dict), str(path))


def load_head(
    path: str | Path, mesh: jax.sharding.Mesh, target: Llama4Config, dtype: Any = None
) -> Head:
    """Loads a head straight into the sharding that `mesh` gives each parameter.

    Args:
        path: a checkpoint of `jaxmoe convert --target`.
        mesh: the devices, those of the target.
        target: the model that it drafts for.
        dtype: what to cast to; None keeps the dtype of each array.

    Raises:
        UserError: if the checkpoint is unfinished, damaged or of another target, or the mesh does
            not divide a parameter.
    """
    finished, config = _open(Path(path))
    check_target(config, target, str(path))
    shapes = abstract_eagle(config, mesh, dtype or jnp.float32)
    leaves, structure = jax.tree.flatten(shapes)
    params = []
    for name, shape in zip(named_head_specs(config), leaves, strict=True):
        array = finished.open_array(name, shape.shape, FLOATS)
        wanted = jax.ShapeDtypeStruct(shape.shape, dtype or array.dtype, sharding=shape.sharding)
        params.append(load_array(array, wanted))
    ids = finished.open_array(TOKEN_IDS, (config.draft_vocab_size,), ("int32",))
    everywhere = meshes.sharding(mesh, PartitionSpec())
    token_ids = load_array(ids, jax.ShapeDtypeStruct(ids.shape, jnp.int32, sharding=everywhere))
    return Head(config, structure.unflatten(params), token_ids)


def check_token_ids(ids: Any, config: EagleConfig, source: str) -> None:
    """Raises a UserError unless ids [G] of NumPy ascend and are the target's."""
    ascends = bool((ids[1:] > ids[:-1]).all())
    if len(ids) != config.draft_vocab_size or not ascends or ids[0] < 0:
        raise UserError(f"{source} has tokens of a draft vocabulary that do not ascend.")
    if ids[-1] >= config.vocab_size:
        raise UserError(
            f"{source} can guess the token {ids[-1]}, but its target has {config.vocab_size}."
        )
