"""What is to run, and the arrays that one step of it holds on a mesh."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.mesh import AXES, MeshConfig, activation_axes, axis_size, check_divides, padded_shape
from jaxmoe.model.cache import abstract_cache, round_capacity
from jaxmoe.model.params import abstract_params, named_params, stored_axes
from jaxmoe.plan.layout import device_bytes

Task = Literal["decode", "prefill", "train"]
TASKS = ("decode", "prefill", "train")
FORMATS = ("bf16", "fp8", "int8", "int4")
SEGMENT = 8192  # tokens of a row that prefill feeds at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A step to plan: one token a row, a segment of a prompt, or a batch to train on.

    Attributes:
        context: tokens a row holds when the step is done.
        rows: how many rows there are.
        weights, kv: formats of the matrices and of the cache.
        segment: tokens of a row that prefill feeds at once.
    """

    config: Llama4Config
    task: Task = "decode"
    context: int = SEGMENT
    rows: int = 1
    weights: str = "bf16"
    kv: str = "bf16"
    segment: int = SEGMENT

    def __post_init__(self):
        most = self.config.max_position_embeddings
        if not 1 <= self.context <= most:
            raise UserError(f"context {self.context} is not between 1 and the model's {most}.")
        for name in ("rows", "segment"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is below 1.")
        if self.task == "train" and (self.weights, self.kv) != ("bf16", "bf16"):
            raise UserError(
                "training keeps float32 weights, bfloat16 copies and no cache: leave out --weights "
                "and --kv."
            )

    @property
    def tokens(self) -> int:
        """New tokens of each row in a step."""
        return {"decode": 1, "prefill": min(self.segment, self.context)}.get(
            self.task, self.context
        )

    @property
    def format(self) -> str | None:
        """As `abstract_params` takes it."""
        return None if self.weights == "bf16" else self.weights

    @property
    def kv_dtype(self) -> Any:
        """As `abstract_cache` and `abstract_arguments` take it."""
        return jnp.bfloat16 if self.kv == "bf16" else self.kv


@functools.cache
def abstract_mesh(mesh: MeshConfig) -> AbstractMesh:
    """A mesh of devices that need not be there: enough to lay arrays out."""
    sizes = dataclasses.astuple(mesh)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class Stored:
    """Arrays of one shape that store parameters.

    Attributes:
        name: of the first, as in `layers.0.feed_forward.experts.gate`.
        count: how many layers have it.
        axes: the logical axis of each dimension.
        packed: numbers in an element: two of int4 in a byte.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str | None, ...]
    packed: int = 1

    @property
    def is_expert(self) -> bool:
        """Whether it is of the routed experts."""
        return ".experts." in self.name

    def size(self, mesh: MeshConfig) -> int:
        """Elements on one device, in all layers."""
        devices = abstract_mesh(mesh)
        parts = (axis_size(devices, axis) if axis else 1 for axis in self.axes)
        shape = padded_shape(self.shape, self.axes, devices)
        return self.count * math.prod(n // part for n, part in zip(shape, parts, strict=True))

    def nbytes(self, mesh: MeshConfig) -> int:
        """Of one device, in all layers."""
        return self.size(mesh) * self.dtype.itemsize

    def numbers(self, mesh: MeshConfig) -> int:
        """How many parameters one device has, in all layers."""
        return self.size(mesh) * self.packed


@functools.cache
def stored_params(config: Llama4Config, format: str | None, dtype: str = "bfloat16") -> tuple:
    """`abstract_params` as `Stored`s: layers of a kind have equal parameters, and are counted."""
    kinds = tuple(dict.fromkeys(config.layers))
    small = dataclasses.replace(config, layers=kinds)
    params = abstract_params(small, abstract_mesh(MeshConfig()), jnp.dtype(dtype), format)
    stored = []
    for name, (spec, w) in named_params(small, params).items():
        layer = name.split(".")[1] if name.startswith("layers.") else None
        count = 1 if layer is None else config.layers.count(kinds[int(layer)])
        packed = 2 if getattr(w, "format", None) == "int4" else 1
        axes = jax.tree.leaves(stored_axes(spec, w), is_leaf=lambda x: isinstance(x, tuple))
        for (path, x), each in zip(jax.tree.leaves_with_path(w), axes, strict=True):
            part = f"{name}{jax.tree_util.keystr(path)}"
            numbers = packed if x.dtype == jnp.int8 else 1
            stored.append(Stored(part, count, x.shape, x.dtype, each, numbers))
    return tuple(stored)


def check_mesh(work: Work, mesh: MeshConfig) -> None:
    """Raises a UserError if the mesh does not divide a parameter, as `abstract_params` does."""
    abstract = abstract_mesh(mesh)
    for each in stored_params(work.config, work.format):
        shape = each.shape
        if work.task != "train":
            shape = padded_shape(shape, each.axes, abstract)
        check_divides(each.name, shape, each.axes, abstract)


def weight_bytes(work: Work, mesh: MeshConfig) -> int:
    """Of one device's parameters, as inference stores them."""
    return sum(each.nbytes(mesh) for each in stored_params(work.config, work.format))


def capacity(work: Work, mesh: MeshConfig) -> int:
    """Slots of each row's cache."""
    return round_capacity(work.context, abstract_mesh(mesh))


def cache_bytes(work: Work, mesh: MeshConfig) -> int:
    """Of one device's cache, with coordinates and tables."""
    abstract = abstract_mesh(mesh)
    axes = activation_axes(abstract, "batch", work.rows)
    parts = math.prod(abstract.shape[axis] for axis in axes)
    alike = MeshConfig(data=parts, sequence=mesh.sequence, tensor=mesh.tensor)
    return _cache_bytes(work.config, work.rows, work.context, work.kv_dtype, alike)


@functools.cache
def _cache_bytes(config: Llama4Config, rows: int, context: int, kv: Any, mesh: MeshConfig) -> int:
    """Layers of a kind have equal parts: one of each is laid out, and counted."""
    abstract, kinds = abstract_mesh(mesh), tuple(dict.fromkeys(config.layers))
    small = dataclasses.replace(config, layers=kinds)
    cache = abstract_cache(small, rows, round_capacity(context, abstract), kv, abstract)
    layers = zip(kinds, cache.layers, strict=True)
    shared = device_bytes(cache._replace(layers=()))
    return shared + sum(config.layers.count(kind) * device_bytes(layer) for kind, layer in layers)
