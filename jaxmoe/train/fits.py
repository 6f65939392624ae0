"""What a run needs on hardware that is absent: its own step, compiled by the real compiler."""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from rich.table import Table

from jaxmoe.checkpoint import store
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.hf_config import from_hf
from jaxmoe.mesh import MeshConfig, activation_spec, sharding
from jaxmoe.model.params import abstract_params
from jaxmoe.plan.compiled import compile_lowered
from jaxmoe.plan.layout import device_bytes
from jaxmoe.plan.models import PRESETS, read_model
from jaxmoe.plan.planner import resolved
from jaxmoe.plan.targets import Target, absent_devices
from jaxmoe.plan.training import no_batch
from jaxmoe.plan.work import Work
from jaxmoe.train.config import DataConfig, TrainConfig
from jaxmoe.train.data import Batch
from jaxmoe.train.preferences import PreferenceBatch
from jaxmoe.train.step import make_step
from jaxmoe.train.trainer import Setup, set_up

GB = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of a training step on one device, as the compiler counts them.

    Attributes:
        target: the devices.
        mesh: how they are divided.
        frozen: parameters that are not trained.
        trained: parameters that are.
        optimizer: the optimizer's statistics.
        temporaries: what is allocated during the step, gradients and activations among it.
        seconds: how long compiling took.
    """

    target: Target
    mesh: MeshConfig
    frozen: int
    trained: int
    optimizer: int
    temporaries: int
    seconds: float

    @property
    def peak(self) -> int:
        """All of it together."""
        return self.frozen + self.trained + self.optimizer + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether a device has as much, less what its target keeps in reserve."""
        return self.peak <= self.target.limit


def compile_run(
    config: TrainConfig,
    target: Target,
    model: str | None,
    weights: str | None = None,
    source: str = "the config",
) -> StepMemory:
    """Compiles the step of a run on texts for a target; needs neither its data nor its checkpoint.

    Args:
        config: the run, whose `mesh` has to form the target's devices.
        target: the devices.
        model: a preset such as `scout`, a folder of Hugging Face's, or a checkpoint; None takes the
            config's `model`.
        weights: the format of the matrices that are not trained, such as `int4`; None for bfloat16.
        source: what error messages call the config.

    Raises:
        UserError: if the mesh does not divide the model, no compiler serves the target, or the
            step does not fit into a device's memory by far.
    """
    mesh = resolved(MeshConfig.parse(config.mesh or "data=-1"), target)
    architecture = from_hf(config.model, f"{source}, model") if model is None else read_model(model)
    if config.rows.length > architecture.max_position_embeddings:
        raise UserError(
            f"data.length {config.rows.length} is more than the "
            f"{architecture.max_position_embeddings} tokens of the model."
        )
    shapes = functools.partial(_shapes, model=model, weights=weights)
    return _compile(config, architecture, mesh, target, shapes, source)


def compile_training(work: Work, mesh: MeshConfig, target: Target) -> StepMemory:
    """Compiles the step of a plan's run, with the plan's rows and context in place of the run's.

    Raises:
        UserError: as `compile_run`.
    """
    run = work.training
    data = run.data or DataConfig(files=("rows",), length=work.context, batch_size=work.rows)
    data = dataclasses.replace(data, length=work.context, batch_size=work.rows)
    run = dataclasses.replace(run, data=data)
    shapes = functools.partial(_shapes, model=None, weights=work.format)
    return _compile(run, work.config, mesh, target, shapes, "the run")


def _compile(
    config: TrainConfig,
    architecture: Llama4Config,
    mesh: MeshConfig,
    target: Target,
    shapes: Callable[..., dict],
    source: str,
) -> StepMemory:
    """Compiles a run's step; `shapes` makes the parameters' of an architecture and devices."""
    devices, start = mesh.make(absent_devices(target)), time.perf_counter()
    stored = shapes(architecture, devices)
    setup = set_up(config, architecture, devices, source, None, no_batch, stored)
    analysis: Any = _compiled(setup, target).memory_analysis()
    state = setup.abstract
    return StepMemory(
        target=target,
        mesh=mesh,
        frozen=device_bytes(setup.frozen),
        trained=device_bytes(state.params),
        optimizer=device_bytes(_on_devices(state.optimizer)),
        temporaries=analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes,
        seconds=time.perf_counter() - start,
    )


def _shapes(
    architecture: Llama4Config, mesh: jax.sharding.Mesh, model: str | None, weights: str | None
) -> dict:
    """The parameters' shapes, as a checkpoint stores them or in the wanted format."""
    if model is None or model in PRESETS or (Path(model) / "config.json").exists() or weights:
        return abstract_params(architecture, mesh, jnp.bfloat16, weights, pads=False)
    return store.abstract(model, mesh)[1]


def _on_devices(optimizer: Any) -> list:
    """The statistics that are not in the host's memory."""
    leaves = jax.tree.leaves(optimizer)
    return [x for x in leaves if x.sharding.memory_kind != "pinned_host"]


def _compiled(setup: Setup, target: Target) -> jax.stages.Compiled:
    step: Any = make_step(setup.config, setup.model, setup.optimizer, setup.loss, setup.abstract)
    with jax.set_mesh(setup.mesh):
        lowered = step.lower(setup.frozen, setup.abstract, _abstract_batch(setup))
    return compile_lowered(lowered, target)


def _abstract_batch(setup: Setup) -> Any:
    """The shapes of the batches of a step."""
    rows, length = setup.config.rows.batch_size, setup.config.rows.length
    parts = () if setup.config.accumulate == 1 else (setup.config.accumulate,)

    def array(dtype: Any, *shape: int) -> Any:
        axes = ("batch", "length", None)[: len(shape)]
        axes = axes if shape[1] == length else ("batch", *[None] * (len(shape) - 1))
        of_rows = activation_spec(setup.mesh, axes, shape)
        spec = PartitionSpec(*[None] * len(parts), *of_rows)
        return jax.ShapeDtypeStruct((*parts, *shape), dtype, sharding=sharding(setup.mesh, spec))

    tokens, learned = array(jnp.int32, rows, length), array(jnp.bool_, rows, length)
    several = bool(setup.config.rows.source_names)
    if setup.config.preference is None:
        return Batch(tokens, tokens, learned, tokens if several else None)
    document, reference = array(jnp.int32, rows, 1), None
    if setup.plan is None or setup.plan.opened is not None:
        reference = array(jnp.float32, rows, 1, 2)
    source = document if several else None
    return PreferenceBatch(tokens, tokens, learned, document, reference, source)


def memory_table(found: StepMemory) -> Table:
    """The bytes as a table to print."""
    table = Table(title=f"A step on {found.target.name}, {found.mesh}: GB of each device")
    table.add_column("")
    table.add_column("GB", justify="right")
    for name in ("frozen", "trained", "optimizer", "temporaries"):
        table.add_row(name, f"{getattr(found, name) / GB:.2f}")
    table.add_section()
    table.add_row("together", f"{found.peak / GB:.2f}")
    table.add_row("there is", f"{found.target.limit / GB:.2f}")
    table.caption = f"By the target's compiler, in {np.ceil(found.seconds):.0f} s."
    return table
