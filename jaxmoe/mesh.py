"""The device mesh, and the table that maps logical axes to mesh axes.

Only this module names mesh axes: parameters and activations name logical axes, such as `embed` and
`heads`.
"""

import dataclasses
import math

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmoe.errors import UserError
from jaxmoe.parsing import read_yaml

AXES = ("data", "fsdp", "expert", "sequence", "tensor")

# Logical axes of parameters that are padded to a multiple of the mesh axes' sizes.
PADDED = ("vocab",)

# Logical axis -> mesh axes that shard it. The mesh must divide parameters, except along PADDED
# axes; activations are replicated over mesh axes that do not divide them.
RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "vocab": ("tensor",),
    "embed": ("fsdp",),  # gathered before use
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "expert": ("expert",),
    # activations and cache
    "batch": ("data", "fsdp", "expert"),  # outside the experts, the expert axis shards rows too
    "length": ("sequence",),
    "residual": ("sequence", "tensor"),  # of a length, between layers that are recomputed
    "tiles": ("data", "fsdp", "expert", "sequence", "tensor"),  # of images; they need no exchange
    "matrices": ("expert", "fsdp", "tensor"),  # of an expert each, while they are whole
    "slots": ("sequence",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each mesh axis has; at most one is -1, to be inferred."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1

    @classmethod
    def parse(cls, text: str) -> "MeshConfig":
        """Reads `expert=4,sequence=2`, or a YAML file of the same names.

        Raises:
            UserError: for an unknown axis, a size that is no number, or an unreadable file.
        """
        if text.endswith((".yaml", ".yml")):
            return cls.from_mapping(_read_yaml(text), source=text)
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        sizes = {axis.strip(): size.strip() for axis, _, size in pairs}
        if len(sizes) < len(pairs):
            raise UserError(f"mesh '{text}' names an axis twice.")
        return cls.from_mapping(sizes, source=f"'{text}'")

    @classmethod
    def from_mapping(cls, sizes: dict, source: str) -> "MeshConfig":
        """Reads a mapping from axis to size; errors name `source`.

        Raises:
            UserError: for an unknown axis, or a size that is no number or not possible.
        """
        parsed = {}
        for axis, size in sizes.items():
            if axis not in AXES:
                raise UserError(
                    f"mesh {source} names axis {str(axis)!r:.80}; the axes are {', '.join(AXES)}."
                )
            try:
                parsed[axis] = int(str(size))
            except ValueError:
                raise UserError(
                    f"mesh {source} gives {axis} the size {str(size)!r:.80}, no number."
                ) from None
            if parsed[axis] < 1 and parsed[axis] != -1:
                raise UserError(
                    f"mesh {source} gives {axis} the size {size!s:.80}; use 1 or more, or -1."
                )
        return cls(**parsed)

    def resolve(self, num_devices: int) -> "MeshConfig":
        """Replaces an axis of -1 by its size.

        Raises:
            UserError: if several axes are -1, or the sizes do not multiply to `num_devices`.
        """
        sizes = dataclasses.asdict(self)
        inferred = [axis for axis, size in sizes.items() if size == -1]
        if len(inferred) > 1:
            raise UserError(
                f"mesh {self} has {len(inferred)} sizes of -1; only one can be inferred."
            )
        known = math.prod(size for size in sizes.values() if size != -1)
        if inferred:
            sizes[inferred[0]] = num_devices // known
        if math.prod(sizes.values()) != num_devices:
            raise UserError(
                f"mesh {self} does not fit {num_devices} device(s): the sizes multiply to {known}"
                f"{' before ' + inferred[0] if inferred else ''}; change the mesh or --cpu-devices."
            )
        return MeshConfig(**sizes)

    def make(self, devices=None) -> Mesh:
        """A `jax.sharding.Mesh` over `devices`, by default all of JAX's devices."""
        devices = jax.devices() if devices is None else devices
        sizes = dataclasses.astuple(self.resolve(len(devices)))
        axis_types = (AxisType.Auto,) * len(AXES)
        try:
            return jax.make_mesh(sizes, AXES, axis_types=axis_types, devices=devices)
        except NotImplementedError:  # raised if an axis needs part of a TPU torus axis, as 8 of 4x4
            grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
            return Mesh(grid, AXES, axis_types=axis_types)

    def __str__(self) -> str:
        sizes = {axis: size for axis, size in dataclasses.asdict(self).items() if size != 1}
        return ",".join(f"{axis}={size}" for axis, size in sizes.items()) or "data=1"


def _read_yaml(path: str) -> dict:
    content = read_yaml(path)
    content = content.get("mesh", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise UserError(f"mesh file {path} holds no mapping; write lines such as 'expert: 4'.")
    return content


def axis_size(mesh, logical: str) -> int:
    """How many devices a parameter's logical axis is sharded over."""
    return math.prod(mesh.shape[axis] for axis in RULES[logical])


def param_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The sharding of a stored parameter, from its logical axes."""
    return PartitionSpec(*(RULES[axis] if axis else None for axis in axes))


def param_spec_at_use(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The sharding of a parameter inside its layer: gathered over fsdp, otherwise as stored."""
    return param_spec(tuple(None if axis == "embed" else axis for axis in axes))


def padded_shape(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh) -> tuple[int, ...]:
    """A parameter's shape on the mesh: `PADDED` axes rounded up to a size that the mesh divides."""
    multiples = (axis_size(mesh, axis) if axis in PADDED else 1 for axis in axes)
    return tuple(-(-size // n) * n for size, n in zip(shape, multiples, strict=True))


def check_divides(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh) -> None:
    """Raises a UserError if the mesh does not divide a parameter's dimension."""
    for size, axis in zip(shape, axes, strict=True):
        if axis and size % axis_size(mesh, axis):
            raise UserError(
                f"mesh axis {'*'.join(RULES[axis])}={axis_size(mesh, axis)} does not divide the "
                f"{size} of '{axis}' in {name} {shape}; choose a divisor of {size}."
            )


def activation_axes(mesh, logical: str | None, size: int) -> tuple[str, ...]:
    """The mesh axes that shard a dimension of an activation.

    They are the first of its logical axis's mesh axes, as many as together divide its size.
    """
    chosen: tuple[str, ...] = ()
    product = 1
    for axis in RULES[logical] if logical else ():
        product *= mesh.shape[axis]
        if size % product:
            break
        chosen += (axis,) if mesh.shape[axis] > 1 else ()
    return chosen


def token_axes(mesh, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The mesh axes along which devices have different tokens of an activation [B, S, ...]."""
    rows, length = zip(("batch", "length"), shape[:2], strict=True)
    return activation_axes(mesh, *rows) + activation_axes(mesh, *length)


def activation_spec(mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """The sharding of an activation or cache array, from its logical axes and shape."""
    return sharded_spec(
        mesh, *(activation_axes(mesh, axis, size) for axis, size in zip(axes, shape, strict=True))
    )


def sharded_spec(mesh, *dimensions: tuple[str, ...]) -> PartitionSpec:
    """The PartitionSpec of dimensions that are sharded over mesh axes, in jit's canonical form.

    The form is that of compiled programs' outputs: without axes of one device, tuples of one axis
    and trailing Nones. jit would compile again for a spec that is equal but written differently.
    """
    entries: list = []
    for axes in dimensions:
        chosen = tuple(axis for axis in axes if mesh.shape[axis] > 1)
        entries.append(chosen if len(chosen) > 1 else next(iter(chosen), None))
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def sharded_axes(logical: str) -> tuple[str, ...]:
    """The axes of the current mesh, of more than one device, that shard a parameter's axis."""
    mesh = current_mesh()
    return () if mesh is None else tuple(axis for axis in RULES[logical] if mesh.shape[axis] > 1)


def current_mesh():
    """The mesh set by `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation to the sharding of its logical axes; does nothing without a mesh."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return _lay_out(x, activation_spec(mesh, axes, x.shape))


def constrain_param(w: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Constrains a parameter to be gathered over fsdp; does nothing without a mesh."""
    if current_mesh() is None:
        return w
    return _lay_out(w, param_spec_at_use(axes))


def _lay_out(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Shards an array by a spec on the current mesh, under jit and outside it."""
    try:
        mesh = None if isinstance(x, jax.core.Tracer) else jax.sharding.get_mesh()
    except ValueError:  # raised for a constant in a traced function: the mesh is abstract there
        mesh = None
    if mesh is None:
        return jax.lax.with_sharding_constraint(x, spec)
    return jax.device_put(x, NamedSharding(mesh, spec))


def sharding(mesh, spec: PartitionSpec) -> NamedSharding:
    """The NamedSharding of a spec on a mesh."""
    return NamedSharding(mesh, spec)


def per_device(body, in_specs, out_specs):
    """`jax.shard_map` of `body` over all axes of the current mesh; without a mesh `body` itself."""
    mesh = current_mesh()
    if mesh is None:
        return body
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def on_all_devices(x: jax.Array) -> jax.Array:
    """The array whole on every device of the current mesh, so that every process can read it."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, PartitionSpec())
