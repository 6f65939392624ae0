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
    """What one step turns into the next."""

    params: dict  # float32
    optimizer: Any
    step: jax.Array  # int32: steps done


def abstract_state(
    model: Llama4Config, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Shapes and shardings: the optimizer's moments lie where their parameters lie.

    Raises:
        UserError: if the mesh does not divide a parameter.
    """
    everywhere = meshes.sharding(mesh, PartitionSpec())
    params = abstract_params(model, mesh, jnp.float32, pads=False)
    moments = optax.tree.map_params(
        optimizer.init,
        lambda moment, param: param,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    return TrainState(params, moments, cast(jax.Array, step))


def init_state(
    model: Llama4Config, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh, seed: int
) -> TrainState:
    """The state before the first step, of random parameters, made where it is to lie."""

    def init(key: jax.Array) -> TrainState:
        params = init_params(model, key, jnp.float32)
        return TrainState(params, optimizer.init(params), jnp.int32(0))

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, optimizer, mesh))
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def state_of(
    params: dict, model: Llama4Config, optimizer: optax.GradientTransformation, mesh
) -> TrainState:
    """The state before the first step, of these parameters, which it takes over."""
    abstract = abstract_state(model, optimizer, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, (abstract.optimizer, abstract.step))

    def init(params: dict):
        return optimizer.init(params), jnp.int32(0)

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
