"""What lands where: each parameter's place on the mesh and its bytes on a device."""

import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich import box
from rich.table import Table

from jaxmoe.config import Llama4Config
from jaxmoe.mesh import axis_size, check_divides, param_spec, sharding
from jaxmoe.model.params import ParamSpec, named_specs


def device_bytes(tree) -> int:
    """Bytes on one device of a tree of sharded arrays or ShapeDtypeStructs."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def layout_table(config: Llama4Config, mesh: Mesh, dtype=jnp.bfloat16) -> Table:
    """A table to print: one line for each kind of parameter, and the sum.

    Raises:
        UserError: if the mesh does not divide a parameter.
    """
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    title = f"Parameters on {mesh.size} device(s): {sizes or 'one'}"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), title_justify="left")
    for column in ("parameter", "n", "shape", "spread over", "MiB each"):
        number = column in ("n", "MiB each")
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    total = 0
    for pattern, (count, spec) in _kinds(config).items():
        check_divides(pattern, spec.shape, spec.axes, mesh)
        place = sharding(mesh, param_spec(spec.axes))
        nbytes = count * math.prod(place.shard_shape(spec.shape)) * jnp.dtype(dtype).itemsize
        total += nbytes
        shape = "x".join(map(str, spec.shape))
        table.add_row(
            pattern, str(count), shape, _spread(mesh, spec.axes), f"{nbytes / 2**20:,.1f}"
        )
    table.add_section()
    table.add_row("all", "", "", "", f"{total / 2**20:,.1f}")
    return table


def _kinds(config: Llama4Config) -> dict[str, tuple[int, ParamSpec]]:
    """Parameters that differ only in their layer, as pattern -> (how many, spec)."""
    kinds: dict[str, tuple[int, ParamSpec]] = {}
    for name, spec in named_specs(config).items():
        pattern = re.sub(r"^layers\.\d+\.", "*.", name)
        kinds[pattern] = (kinds.get(pattern, (0, spec))[0] + 1, spec)
    return kinds


def _spread(mesh: Mesh, axes: tuple[str | None, ...]) -> str:
    """Such as `expert/4`, the dimensions that are divided; `replicated` if none is."""
    spread = [(axis, axis_size(mesh, axis)) for axis in axes if axis]
    return ", ".join(f"{axis}/{size}" for axis, size in spread if size > 1) or "replicated"
