"""The step to plan, and the sizes of its parameters and cache on a mesh."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from jaxmoe.config import Llama4Config
from jaxmoe.eagle_config import EagleConfig
from jaxmoe.errors import UserError
from jaxmoe.mesh import AXES, MeshConfig, activation_axes, axis_size, check_divides, padded_shape
from jaxmoe.model.eagle import abstract_eagle
from jaxmoe.model.kv_cache import abstract_cache, round_capacity
from jaxmoe.model.params import abstract_params, named_params, stored_axes
from jaxmoe.plan.layout import device_bytes
from jaxmoe.train.config import AdapterConfig, OptimizerConfig, TrainConfig

Task = Literal["decode", "prefill", "train", "lora"]
TASKS = ("decode", "prefill", "train", "lora")
LORA_TARGETS = ("layers.*.attention.*", "*.shared.*")  # unless a run says otherwise
STORAGE_FORMATS = ("bf16", "fp8", "int8", "int4")  # of matrices, and of keys and values
PREFILL_CHUNK = 8192  # tokens of each row that one step of prefill processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A step to plan: one new token per row, a chunk of prefill, or a training batch.

    Attributes:
        config: the model.
        task: what the step does.
        context: how many tokens each row holds after the step.
        rows: the batch size.
        weights: the format of the matrices, one of STORAGE_FORMATS.
        kv: the format of the cache, one of STORAGE_FORMATS.
        prefill_chunk: tokens of each row that one step of prefill processes.
        tiles: of images, in all rows, that the step sees; none in decoding.
        head: that drafts in decoding; None for none.
        run: of training, whose data and mesh do not count; None for the run of `default_run`.
    """

    config: Llama4Config
    task: Task = "decode"
    context: int = PREFILL_CHUNK
    rows: int = 1
    weights: str = "bf16"
    kv: str = "bf16"
    prefill_chunk: int = PREFILL_CHUNK
    tiles: int = 0
    head: EagleConfig | None = None
    run: TrainConfig | None = dataclasses.field(default=None, hash=False)  # it has dicts

    def __post_init__(self):
        most = self.config.max_position_embeddings
        if not 1 <= self.context <= most:
            raise UserError(f"context {self.context} is not between 1 and the model's {most}.")
        for name, value in (("rows", self.rows), ("prefill chunk", self.prefill_chunk)):
            if value < 1:
                raise UserError(f"{name} {value} is below 1.")
        if self.tiles < 0 or (self.tiles and self.config.vision is None):
            raise UserError(f"{self.tiles} tiles need a model with a vision tower, and 0 or more.")
        if self.trains and self.head is not None:
            raise UserError("a head drafts in decoding and not in training: leave out --head.")
        if self.trains and self.kv != "bf16":
            raise UserError("training keeps no cache: leave out --kv.")
        if self.task == "train" and self.weights != "bf16":
            raise UserError(
                "parameters in 8 or 4 bits are not trained: leave out --weights, or plan --task "
                "lora."
            )
        if self.run is not None:
            _check_run(self.run, self.task)

    @property
    def trains(self) -> bool:
        """Whether the step is one of training, of parameters or of adapters."""
        return self.task in ("train", "lora")

    @property
    def training(self) -> TrainConfig:
        """The run whose step is planned."""
        return default_run(self.task) if self.run is None else self.run

    @property
    def tokens(self) -> int:
        """The number of new tokens of each row in a step."""
        new = {"decode": 1, "prefill": min(self.prefill_chunk, self.context)}
        return new.get(self.task, self.context)

    @property
    def format(self) -> str | None:
        """The weights' format as the argument of `abstract_params`: None for bf16."""
        return None if self.weights == "bf16" else self.weights

    @property
    def kv_dtype(self) -> Any:
        """The cache's format as the argument of `abstract_cache`: a dtype for bf16."""
        return jnp.bfloat16 if self.kv == "bf16" else self.kv


@functools.cache
def default_run(task: str) -> TrainConfig:
    """The run that is planned unless another is given: in bfloat16, with AdamW and `remat: full`.

    Args:
        task: `train`, of float32 parameters, or `lora`, of adapters of the attention and the shared
            experts.
    """
    return TrainConfig(
        init="checkpoint",
        data=None,
        optimizer=OptimizerConfig(peak_lr=1e-4),
        adapter=AdapterConfig(targets=LORA_TARGETS) if task == "lora" else None,
        output="run",
        steps=1,
        dtype="bfloat16",
        remat="full",
    )


def _check_run(run: TrainConfig, task: str) -> None:
    """Raises a UserError for a run of another task, or one that the formula does not know."""
    its_task = "train" if run.adapter is None else "lora"
    if task != its_task:
        raise UserError(f"the run is one of --task {its_task}; leave out --task {task}.")
    if run.head is not None:
        raise UserError(
            "the formula knows no runs that train a head; use jaxmoe train RUN.yaml --plan TARGET."
        )
    recomputes = run.remat not in ("none", False)
    if run.dtype != "bfloat16" or run.preference is not None or not recomputes:
        raise UserError(
            "the formula knows runs with dtype bfloat16, a 'remat' and no 'preference'; use "
            "jaxmoe train RUN.yaml --plan TARGET, which compiles any."
        )


@functools.cache
def abstract_mesh(mesh: MeshConfig) -> AbstractMesh:
    """A JAX mesh without devices, which suffices to compute shardings."""
    sizes = dataclasses.astuple(mesh)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array that stores a parameter, and how many layers have an array like it.

    Attributes:
        name: the dotted name in the first of the layers, `layers.0.feed_forward.experts.gate`.
        count: how many layers have such an array.
        shape: its shape.
        dtype: its dtype.
        axes: the logical axis of each dimension.
        packed: how many numbers an element holds: two for int4, otherwise one.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str | None, ...]
    packed: int = 1

    @property
    def is_expert(self) -> bool:
        """Whether the array belongs to the routed experts."""
        return ".experts." in self.name

    @property
    def is_vision(self) -> bool:
        """Whether the array belongs to the vision tower, its adapter or the projector."""
        return self.name.startswith("vision.")

    def size(self, mesh: MeshConfig) -> int:
        """The number of elements on one device, in all layers."""
        devices = abstract_mesh(mesh)
        parts = (axis_size(devices, axis) if axis else 1 for axis in self.axes)
        shape = padded_shape(self.shape, self.axes, devices)
        return self.count * math.prod(n // part for n, part in zip(shape, parts, strict=True))

    def nbytes(self, mesh: MeshConfig) -> int:
        """Bytes on one device, in all layers."""
        return self.size(mesh) * self.dtype.itemsize

    def numbers(self, mesh: MeshConfig) -> int:
        """The number of parameters on one device, in all layers."""
        return self.size(mesh) * self.packed


@functools.cache
def stored_params(config: Llama4Config, format: str | None, dtype: str = "bfloat16") -> tuple:
    """The arrays of `abstract_params` as `Stored`, one for all layers of a kind.

    Args:
        config: the model.
        format: of quantized matrices; None for none.
        dtype: of arrays that are not quantized.
    """
    kinds = tuple(dict.fromkeys(config.layers))
    small = dataclasses.replace(config, layers=kinds)
    params = abstract_params(small, abstract_mesh(MeshConfig()), jnp.dtype(dtype), format)
    stored = []
    for name, (spec, w) in named_params(small, params).items():
        layer = name.split(".")[1] if name.startswith("layers.") else None
        count = 1 if layer is None else config.layers.count(kinds[int(layer)])
        packed = 2 if getattr(w, "format", None) == "int4" else 1
        axes = jax.tree.leaves(stored_axes(spec, w), is_leaf=lambda x: isinstance(x, tuple))
        for (path, x), x_axes in zip(jax.tree.leaves_with_path(w), axes, strict=True):
            part = f"{name}{jax.tree_util.keystr(path)}"
            numbers = packed if x.dtype == jnp.int8 else 1
            stored.append(Stored(part, count, x.shape, x.dtype, x_axes, numbers))
    return tuple(stored)


def check_mesh(work: Work, mesh: MeshConfig) -> None:
    """Raises a UserError if the mesh does not divide a parameter, as `abstract_params` does.

    Those of the head count too.
    """
    abstract = abstract_mesh(mesh)
    for stored in stored_params(work.config, work.format):
        shape = stored.shape
        if not work.trains:
            shape = padded_shape(shape, stored.axes, abstract)
        check_divides(stored.name, shape, stored.axes, abstract)
    if work.head is not None:
        abstract_eagle(work.head, abstract, jnp.bfloat16)


def weight_bytes(work: Work, mesh: MeshConfig) -> int:
    """Bytes of the parameters on one device, as inference stores them."""
    return sum(stored.nbytes(mesh) for stored in stored_params(work.config, work.format))


def capacity(work: Work, mesh: MeshConfig) -> int:
    """The capacity of each row's cache, in tokens."""
    return round_capacity(work.context, abstract_mesh(mesh))


def cache_bytes(work: Work, mesh: MeshConfig) -> int:
    """Bytes of the cache on one device, with coordinates and page tables."""
    abstract = abstract_mesh(mesh)
    axes = activation_axes(abstract, "batch", work.rows)
    parts = math.prod(abstract.shape[axis] for axis in axes)
    # The axes that shard rows are one, so that meshes with equal results share a cache entry.
    equivalent = MeshConfig(data=parts, sequence=mesh.sequence, tensor=mesh.tensor)
    return _cache_bytes(work.config, work.rows, work.context, work.kv_dtype, equivalent)


@functools.cache
def _cache_bytes(config: Llama4Config, rows: int, context: int, kv: Any, mesh: MeshConfig) -> int:
    """Bytes of the cache on one device; lays out one layer of each kind and multiplies."""
    abstract, kinds = abstract_mesh(mesh), tuple(dict.fromkeys(config.layers))
    small = dataclasses.replace(config, layers=kinds)
    cache = abstract_cache(small, rows, round_capacity(context, abstract), kv, abstract)
    layers = zip(kinds, cache.layers, strict=True)
    shared = device_bytes(cache._replace(layers=()))
    return shared + sum(config.layers.count(kind) * device_bytes(layer) for kind, layer in layers)
