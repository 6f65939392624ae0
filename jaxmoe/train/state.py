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
from jaxmoe.config import Llama4Config
from jaxmoe.model.params import abstract_params, init_params


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
    """The state before the first step, made where it is to lie."""

    def init(key: jax.Array) -> TrainState:
        params = init_params(model, key, jnp.float32)
        return TrainState(params, optimizer.init(params), jnp.int32(0))

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, optimizer, mesh))
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


class SavedStates:
    """The folder that a killed run resumes from; holds the newest state only."""

    def __init__(self, checkpointer: ocp.training.Checkpointer):
        self._checkpointer = checkpointer

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator["SavedStates"]:
        """Waits at its end until the last state is on disk."""
        newest = cast(Any, ocp.training.preservation_policies.LatestN(1))
        with ocp.training.Checkpointer(
            str(folder.resolve()), preservation_policy=newest, cleanup_tmp_directories=True
        ) as checkpointer:
            yield cls(checkpointer)

    def newest(self, abstract: TrainState) -> TrainState | None:
        """The newest state, laid out as `abstract` says; None if there is none."""
        if self._checkpointer.latest is None:
            return None
        return cast(TrainState, self._checkpointer.load(None, cast(Any, abstract)))

    def save(self, state: TrainState) -> None:
        """Saves a state; whatever interrupts this, the state before it stays readable."""
        self._checkpointer.save(int(state.step), cast(Any, state))
