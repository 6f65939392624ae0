"""What a run needs on hardware that is absent: its own step, compiled by the real compiler."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from rich.table import Table

from jaxmoe.errors import UserError
from jaxmoe.mesh import MeshConfig, activation_spec, sharding
from jaxmoe.model.params import abstract_params
from jaxmoe.plan.compiled import compile_lowered
from jaxmoe.plan.layout import device_bytes
from jaxmoe.plan.models import read_model
from jaxmoe.plan.planner import resolved
from jaxmoe.plan.targets import Target, absent_devices
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.data import Batch
from jaxmoe.train.preferences import PreferenceBatch, preference_loss
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
    config: TrainConfig, target: Target, model: str, weights: str | None = None
) -> StepMemory:
    """Compiles the step of a run for a target; needs neither its data nor its checkpoint.

    Args:
        config: the run, whose `mesh` has to form the target's devices.
        target: the devices.
        model: a preset such as `scout`, a folder of Hugging Face's, or a checkpoint.
        weights: the format of the matrices that are not trained, such as `int4`; None for bfloat16.

    Raises:
        UserError: if the mesh does not divide the model, no compiler serves the target, or the
            step does not fit into a device's memory by far.
    """
    mesh = resolved(MeshConfig.parse(config.mesh or "data=-1"), target)
    devices, start = mesh.make(absent_devices(target)), time.perf_counter()
    architecture = read_model(model)
    if config.rows.length > architecture.max_position_embeddings:
        raise UserError(
            f"data.length {config.rows.length} is more than the "
            f"{architecture.max_position_embeddings} tokens of {model}."
        )
    shapes = abstract_params(architecture, devices, jnp.bfloat16, weights, pads=False)
    loss = None if config.preference is None else preference_loss(config.preference, config.remat)
    setup = set_up(config, architecture, devices, model, loss, _no_batch, shapes)
    analysis: Any = _compiled(setup, target).memory_analysis()
    state = setup.abstract
    return StepMemory(
        target=target,
        mesh=mesh,
        frozen=device_bytes(setup.frozen),
        trained=device_bytes(state.params),
        optimizer=device_bytes(state.optimizer),
        temporaries=analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes,
        seconds=time.perf_counter() - start,
    )


def _no_batch(number: int) -> Any:
    raise AssertionError("a step that is only compiled reads nothing")


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
        of_rows = activation_spec(setup.mesh, ("batch", "length"), (rows, length))
        spec = PartitionSpec(*[None] * len(parts), *of_rows)
        return jax.ShapeDtypeStruct((*parts, *shape), dtype, sharding=sharding(setup.mesh, spec))

    tokens, learned = array(jnp.int32, rows, length), array(jnp.bool_, rows, length)
    if setup.config.preference is None:
        return Batch(tokens, tokens, learned)
    document, reference = array(jnp.int32, rows, 1), None
    if setup.plan is None:
        reference = array(jnp.float32, rows, 1, 2)
    return PreferenceBatch(tokens, tokens, learned, document, reference)


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
