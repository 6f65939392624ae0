"""The state of a run: parameters, optimizer and step; on a mesh, and on disk to resume from."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
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
        params: the parameters that are trained, with None in place of others.
        optimizer: the optimizer's state.
        step: how many steps are done, those that were skipped among them; int32.
        skipped: how many were skipped since their loss or gradient was not finite; int32.
        in_a_row: how many of the last steps were, one after the other; int32.
    """

    params: dict
    optimizer: Any
    step: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array


def abstract_state(
    params: dict,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    dtype: str = "float32",
    offload: bool = False,
) -> TrainState:
    """Shapes and shardings: the optimizer's moments lie where their parameters lie.

    Args:
        params: arrays or ShapeDtypeStructs on the mesh.
        optimizer: takes float32 parameters.
        mesh: the devices.
        dtype: of the parameters.
        offload: whether the moments are in the host's memory.
    """
    everywhere = meshes.sharding(mesh, PartitionSpec())

    def laid_out(dtype: str):
        return lambda p: jax.ShapeDtypeStruct(p.shape, dtype, sharding=p.sharding)

    def moment(shape: Any, param: Any) -> Any:
        if isinstance(shape, optax.MaskedNode):  # where another optimizer has the parameter
            return shape
        return jax.ShapeDtypeStruct(
            shape.shape, shape.dtype, sharding=_sharding_of(shape, param, offload)
        )

    wide = jax.tree.map(laid_out("float32"), params)
    moments = optax.tree.map_params(
        optimizer.init,
        moment,
        jax.eval_shape(optimizer.init, wide),
        wide,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    count = cast(jax.Array, jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere))
    return TrainState(jax.tree.map(laid_out(dtype), params), moments, count, count, count)


def _sharding_of(moment: Any, param: Any, offload: bool) -> NamedSharding:
    """A parameter's sharding, but no axis of which the moment keeps only a mean is divided."""
    layout, ndim = param.sharding, len(param.shape)
    axes = (*layout.spec, *(None for _ in range(ndim - len(layout.spec))))
    kept = zip(axes, moment.shape, param.shape, strict=True)
    spec = PartitionSpec(*(axis if n == size else None for axis, n, size in kept))
    kind = "pinned_host" if offload else layout.memory_kind
    return NamedSharding(layout.mesh, spec, memory_kind=kind)


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
    params: dict,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    dtype: str = "float32",
    offload: bool = False,
) -> TrainState:
    """The state before the first step, of these parameters, which it takes over.

    Args:
        params: arrays on the mesh.
        optimizer, mesh, dtype, offload: as for `abstract_state`.
    """
    abstract = abstract_state(params, optimizer, mesh, dtype=dtype, offload=offload)
    shardings = jax.tree.map(lambda x: x.sharding, abstract[1:])

    def init(params: dict):
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        return optimizer.init(wide), *(jnp.int32(0) for _ in range(3))

    rest = jax.jit(init, out_shardings=shardings)(params)
    return TrainState(jax.tree.map(lambda p: p.astype(dtype), params), *rest)


class SavedStates:
    """The folder that a killed run resumes from; holds the newest state only."""

    def __init__(self, folder: Path, checkpointer: ocp.training.Checkpointer):
        self._folder = folder
        self._checkpointer = checkpointer
        self._writing: Any = None  # the response of the save that may be going on

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
            states = cls(folder, checkpointer)
            try:
                yield states
            finally:
                with orbax_writes(folder), contextlib.closing(checkpointer):
                    states.wait()

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
        """Begins to save a state, unless it is there; what interrupts this leaves the one before.

        Returns once the state is copied to the host: it may be donated then. Waits first until the
        state before is on disk, so that the host never holds two.

        Raises:
            UserError: if the file system refuses, or has refused the state before.
        """
        latest, step = self._checkpointer.latest, int(state.step)
        if latest is None or latest.step < step:
            with orbax_writes(self._folder):
                self.wait()
                self._writing = self._checkpointer.save_async(step, cast(Any, state))

    def wait(self) -> None:
        """Returns once the last state is on disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
