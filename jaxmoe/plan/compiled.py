"""Compiles a step for hardware that may be absent, and reads the compiler's memory analysis."""

import dataclasses
import re
import time
from typing import Any

import jax

from jaxmoe.errors import UserError
from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.head import head_bytes
from jaxmoe.plan.layout import device_bytes
from jaxmoe.plan.steps import abstract_arguments, lower_step
from jaxmoe.plan.targets import Target, absent_devices
from jaxmoe.plan.vision import features_bytes, tower_temporaries
from jaxmoe.plan.work import Work, capacity
from pallas_kernels.compile.absent import compiler_options

_TOO_LARGE = re.compile(r"Used (\S+) of (\S+) hbm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """Bytes of a step on one device, by the compiler's memory analysis.

    Attributes:
        weights: bytes of the parameters, computed from their shapes.
        cache: bytes of the cache, computed from its shapes.
        optimizer: bytes of the optimizer's statistics on the device, of training.
        arguments: bytes of all arguments, as the compiler counts them, and of the vision tower,
            its features and the head.
        temporaries: bytes that are allocated during the step, or by formula in the tower before it.
        outputs: bytes of results that reuse no argument's memory.
        code: bytes of the program.
        seconds: how long lowering and compiling took.
    """

    weights: int
    cache: int
    optimizer: int = 0
    arguments: int
    temporaries: int
    outputs: int
    code: int
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes that are allocated at the same time: arguments, temporaries, outputs and code."""
        return self.arguments + self.temporaries + self.outputs + self.code


def compile_step(work: Work, mesh: MeshConfig, target: Target) -> Compiled:
    """Compiles one step for the target.

    Raises:
        UserError: if no compiler serves the target, or if the step does not fit into a device's
            memory.
    """
    if work.trains:
        return _compile_training(work, mesh, target)
    devices = mesh.make(absent_devices(target))
    start = time.perf_counter()
    arguments = abstract_arguments(
        work.config,
        devices,
        rows=work.rows,
        tokens=work.tokens,
        capacity=capacity(work, mesh),
        format=work.format,
        kv=work.kv_dtype,
    )
    lowered = lower_step(work.config, devices, arguments)
    analysis: Any = compile_lowered(lowered, target).memory_analysis()
    tower = device_bytes(arguments[0].get("vision", {}))  # no argument of a step, but it stays
    beside = tower + features_bytes(work) + head_bytes(work, mesh)
    return Compiled(
        weights=device_bytes(arguments[0]),
        cache=device_bytes(arguments[-1]),
        arguments=analysis.argument_size_in_bytes + beside,
        temporaries=max(analysis.temp_size_in_bytes, tower_temporaries(work, mesh)),
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        seconds=time.perf_counter() - start,
    )


def _compile_training(work: Work, mesh: MeshConfig, target: Target) -> Compiled:
    from jaxmoe.train.fits import compile_training  # which imports this module

    if work.tiles:
        raise UserError("--compile trains on rows of text; leave out --tiles.")
    found = compile_training(work, mesh, target)
    return Compiled(
        weights=found.frozen + found.trained,
        cache=0,
        optimizer=found.optimizer,
        arguments=found.frozen + found.trained + found.optimizer,
        temporaries=found.temporaries,
        outputs=0,
        code=0,
        seconds=found.seconds,
    )


def compile_lowered(lowered: jax.stages.Lowered, target: Target) -> jax.stages.Compiled:
    """The step compiled as the target runs it.

    Raises:
        UserError: if it does not fit into a device's memory.
    """
    try:
        return lowered.compile({} if target.is_tpu else compiler_options())
    except jax.errors.JaxRuntimeError as error:
        too_large = _TOO_LARGE.search(str(error))
        if too_large is None:
            raise
        raise UserError(
            f"the compiler for {target.name} finds no room: the step uses {too_large[1]}iB of the "
            f"{too_large[2]}iB that a device has; use more devices or a shorter context."
        ) from error
