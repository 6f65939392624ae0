"""Where a model's parameters lie: the mesh that is asked for, a default one, or that of arrays."""

import contextlib
from pathlib import Path
from typing import Any, cast

import jax

from jaxmoe.checkpoint import store
from jaxmoe.errors import UserError
from jaxmoe.mesh import MeshConfig


def default_mesh(
    checkpoint: str | Path, dtype: Any = None, text_only: bool = False
) -> jax.sharding.Mesh:
    """All devices, with as little of the model on each as its sizes allow.

    The axis `tensor` is as large as it can be, `expert` has the other devices: on 8 GPUs Scout and
    Maverick get tensor=8. A model that cannot be split so gets data=-1, a copy on each device.

    Args:
        dtype, text_only: as for `jaxmoe.load`.
    """
    count = len(jax.devices())
    for tensor in range(count, 0, -1):
        if count % tensor == 0:
            mesh = MeshConfig(tensor=tensor, expert=count // tensor).make()
            with contextlib.suppress(UserError):
                store.abstract(checkpoint, mesh, dtype, text_only)
                return mesh
    return MeshConfig(data=-1).make()


def make_mesh(mesh: str | MeshConfig | jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The mesh of a text such as "expert=4,tensor=2", or of sizes, over all devices."""
    if isinstance(mesh, jax.sharding.Mesh):
        return mesh
    return (MeshConfig.parse(mesh) if isinstance(mesh, str) else mesh).make()


def mesh_of(params: dict) -> jax.sharding.Mesh | None:
    """The mesh that the parameters were loaded onto; arrays of one device have none."""
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    return cast(jax.sharding.Mesh, sharding.mesh)


def on_mesh(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager:
    """A context in which a mesh is the current one; without a mesh it changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
