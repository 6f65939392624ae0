"""How parameters are sharded over a mesh, and their bytes on a device."""

import math
import re

import jax
from jax.sharding import Mesh
from rich import box
from rich.table import Table

from jaxmoe.config import Llama4Config
from jaxmoe.mesh import axis_size
from jaxmoe.model.params import named_params
from pallas_kernels.quantized import QuantizedMatrix


def device_bytes(tree) -> int:
    """Bytes on one device of a pytree of sharded arrays or ShapeDtypeStructs."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def layout_table(config: Llama4Config, params: dict, mesh: Mesh) -> Table:
    """A table with a line for each kind of parameter: its shape, format, sharding and bytes.

    Args:
        config: the model.
        params: its parameters as arrays or ShapeDtypeStructs, sharded over the mesh.
        mesh: the mesh.
    """
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    title = f"Parameters on {mesh.size} device(s): {sizes or 'one'}"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), title_justify="left")
    for column in ("parameter", "n", "shape", "stored as", "spread over", "MiB each"):
        number = column in ("n", "MiB each")
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for (pattern, form), members in _kinds(config, params).items():
        spec, _ = members[0]
        shape = "x".join(map(str, spec.shape))
        nbytes = sum(device_bytes(w) for _, w in members)
        sharded = _sharded_axes(mesh, spec.axes)
        table.add_row(pattern, str(len(members)), shape, form, sharded, f"{nbytes / 2**20:,.1f}")
    table.add_section()
    table.add_row("all", "", "", "", "", f"{device_bytes(params) / 2**20:,.1f}")
    return table


def _kinds(config: Llama4Config, params: dict) -> dict[tuple[str, str], list]:
    """Groups parameters that differ only in their layer: (spec, array) by (pattern, format)."""
    kinds: dict[tuple[str, str], list] = {}
    for name, (spec, w) in named_params(config, params).items():
        pattern = re.sub(r"^layers\.\d+\.", "*.", name)
        form = w.format if isinstance(w, QuantizedMatrix) else w.dtype.name
        kinds.setdefault((pattern, form), []).append((spec, w))
    return kinds


def _sharded_axes(mesh: Mesh, axes: tuple[str | None, ...]) -> str:
    """The logical axes that are sharded and over how many devices: `expert/4`, or `replicated`."""
    sizes = [(axis, axis_size(mesh, axis)) for axis in axes if axis]
    return ", ".join(f"{axis}/{size}" for axis, size in sizes if size > 1) or "replicated"
