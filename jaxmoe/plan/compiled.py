"""What the compiler of hardware that need not be there says of a step's memory."""

import dataclasses
import re
import time
from typing import Any

import jax

from jaxmoe.errors import UserError
from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.layout import device_bytes
from jaxmoe.plan.steps import abstract_arguments, lower_step
from jaxmoe.plan.targets import Target, absent_devices
from jaxmoe.plan.work import Work, capacity
from pallas_kernels.compile.absent import compiler_options

_TOO_LARGE = re.compile(r"Used (\S+) of (\S+) hbm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """Bytes of one device, by the compiler's memory analysis.

    Attributes:
        weights, cache: of the arguments' shapes.
        arguments: all of them, as the compiler counts.
        temporaries: what is allocated for a step.
        outputs: those that take no argument's place.
        code: the program.
        seconds: that lowering and compiling took.
    """

    weights: int
    cache: int
    arguments: int
    temporaries: int
    outputs: int
    code: int
    seconds: float

    @property
    def peak(self) -> int:
        """All that must be there at once."""
        return self.arguments + self.temporaries + self.outputs + self.code


def compile_step(work: Work, mesh: MeshConfig, target: Target) -> Compiled:
    """Compiles one step of decoding or prefill for the target.

    Raises:
        UserError: if no compiler serves the target or the task, or the compiler finds too little
            memory.
    """
    if work.task == "train":
        raise UserError("--compile serves decode and prefill; leave it out to plan training.")
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
    analysis: Any = _compile(lowered, target).memory_analysis()
    return Compiled(
        weights=device_bytes(arguments[0]),
        cache=device_bytes(arguments[-1]),
        arguments=analysis.argument_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        seconds=time.perf_counter() - start,
    )


def _compile(lowered: jax.stages.Lowered, target: Target) -> jax.stages.Compiled:
    try:
        return lowered.compile({} if target.is_tpu else compiler_options())
    except jax.errors.JaxRuntimeError as error:
        found = _TOO_LARGE.search(str(error))
        if found is None:
            raise
        raise UserError(
            f"the compiler for {target.name} finds no room: the step uses {found[1]}iB of the "
            f"{found[2]}iB that a device has; use more devices or a shorter context."
        ) from error
