"""The state of a run: parameters, optimizer and step; on a mesh, and on disk to resume from."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from orbax.checkpoint import v1 as ocp

from jaxmoe import mesh as meshes
from jaxmoe.checkpoint.zarr.arrays import reason
from jaxmoe.checkpoint.zarr.writer import orbax_writes, quiet_orbax
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.model.params import abstract_params, init_params

# What Orbax raises for files that are missing or of another content.
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError)


class TrainState(NamedTuple):
    """What one step turns into the next.

    Attributes:
        params: the parameters that are trained, float32, with None in place of others.
        optimizer: the optimizer's state.
        step: how many steps were taken, int32.
    """

    params: dict
    optimizer: Any
    step: jax.Array


def abstract_state(
    params: dict, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Shapes and shardings: the optimizer's moments lie where their parameters lie.

    Args:
        params: arrays or ShapeDtypeStructs on the mesh.
    """
    everywhere = meshes.sharding(mesh, PartitionSpec())
    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), params
    )
    moments = optax.tree.map_params(
        optimizer.init,
        lambda moment, param: param,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    return TrainState(params, moments, cast(jax.Array, step))


def random_params(model: Llama4Config, mesh: jax.sharding.Mesh, seed: int) -> dict:
    """A model's random float32 parameters, made where they are to lie.

    Raises:
        UserError: if the mesh does not divide a parameter.
    """
    shapes = abstract_params(model, mesh, jnp.float32, pads=False)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    init = jax.jit(lambda key: init_params(model, key, jnp.float32), out_shardings=shardings)
    return init(jax.random.key(seed))


def state_of(
    params: dict, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """The state before the first step, of these parameters, which it takes over."""
    abstract = abstract_state(params, optimizer, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, (abstract.optimizer, abstract.step))

    def init(params: dict):
        return optimizer.init(params), jnp.int32(0)

    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    return TrainState(params, *jax.jit(init, out_shardings=shardings)(params))


class SavedStates:
    """The folder that a killed run resumes from; holds the newest state only."""

    def __init__(self, folder: Path, checkpointer: ocp.training.Checkpointer):
        self._folder = folder
        self._checkpointer = checkpointer

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator["SavedStates"]:
        """Waits at its end until the last state is on disk.

        Raises:
            UserError: if the file system refuses.
        """
        newest = cast(Any, ocp.training.preservation_policies.LatestN(1))
        with quiet_orbax():
            with orbax_writes(folder):
                checkpointer = ocp.training.Checkpointer(
                    str(folder.resolve()), preservation_policy=newest, cleanup_tmp_directories=True
                )
            try:
                yield cls(folder, checkpointer)
            finally:
                with orbax_writes(folder):
                    checkpointer.close()

    def newest(self, abstract: TrainState) -> TrainState | None:
        """The newest state, laid out as `abstract` says; None if there is none.

        Raises:
            UserError: if it is damaged.
        """
        if self._checkpointer.latest is None:
            return None
        try:
            return cast(TrainState, self._checkpointer.load(None, cast(Any, abstract)))
        except _DAMAGED as error:
            raise UserError(
                f"{self._folder} is damaged: {reason(error):.200}; delete it to begin anew."
            ) from error

    def save(self, state: TrainState) -> None:
        """Saves a state, unless it is there; what interrupts this leaves the state before it.

        Raises:
            UserError: if the file system refuses.
        """
        latest, step = self._checkpointer.latest, int(state.step)
        if latest is None or latest.step < step:
            with orbax_writes(self._folder):
                self._checkpointer.save(step, cast(Any, state))
