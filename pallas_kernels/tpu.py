"""What the TPU kernels share: where they run, and products that keep their operands' precision."""

import re

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.platform import target

LANES, SUBLANES = 128, 8
IN_HBM = pl.BlockSpec(memory_space=pltpu.HBM)
VMEM_BYTES = 48 * 2**20  # of a kernel: every generation since v5p has 64 MiB a core or more


def why_not_tpu(interpret=None) -> str | None:
    """Says why a TPU kernel cannot run on the current device; None if it can.

    Args:
        interpret: `pltpu.InterpretParams()` or True run it without its hardware.
    """
    if interpret is True or isinstance(interpret, pltpu.InterpretParams):
        return None
    if interpret:
        return "this kernel is for TPUs; give pltpu.InterpretParams()"
    if target().platform != "tpu":
        return f"it needs a TPU, and this is {target()}"
    return None


def num_cores() -> int:
    """How many cores of the current TPU share a grid axis that is parallel: two on v5p."""
    device = target()
    return (device.num_cores or 1) if device.platform == "tpu" else 1


def mxu_fp8() -> str | None:
    """The fp8 type whose matrices the current device's MXU widens; None for TPUs before v5.

    Devices that interpret kernels take any.
    """
    generation = re.match(r"TPU v?(\d+)", target().device_kind)
    if generation is None or int(generation[1]) > 6:
        return "float8_e4m3fn"
    return "float8_e4m3b11fnuz" if int(generation[1]) > 4 else None


def dot(x, y, *, transposed: bool = False):
    """x [m, k] times y [k, n], or [n, k] transposed, in float32; float32 is not rounded."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def smallest(dtype) -> float:
    """The smallest positive number of a floating type: that whose bits are 1."""
    return float(jnp.finfo(dtype).smallest_subnormal)


def low_halves(packed: jax.Array, fp8) -> jax.Array:
    """The low half of each byte, an int4 number, as fp8: increased by 8, times the smallest number.

    fp8 numbers whose bits are 0 to 15 are these multiples of the smallest one.

    Args:
        packed: the bytes of four rows in each element, [r / 4, n] int32.
        fp8: the type of the result [r, n].
    """
    return pltpu.bitcast((packed & 0x0F0F0F0F) ^ 0x08080808, fp8)


def increase(x: jax.Array, fp8) -> jax.Array:
    """By how much `low_halves` increases the products of x [r, n]; returns [r, 1]."""
    return x.astype(jnp.float32).sum(-1, keepdims=True) * (8 * smallest(fp8))


def in_hbm(arrays):
    """Arrays that XLA leaves in HBM, rather than copy them to VMEM before the kernel does."""
    return jax.tree.map(lambda x: pltpu.with_memory_space_constraint(x, pltpu.HBM), arrays)
