"""Sizes of the decode kernel, and the shared memory that they take.

Shape letters are those of `decode_mosaic`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.mosaic import SMEM_BYTES, ColumnReduction, Ring, tile
from pallas_kernels.quantized import STORED

WARPGROUPS = 2  # that compute
COLUMN_UNIT = 8
PAGE_UNIT = 64  # a page has a multiple of so many keys
MAX_COLUMNS = 24  # with 32, ptxas spills registers
EARLY_COLUMNS = 16  # with 24, it spills where values are widened while keys are multiplied


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Sizes of the decode kernel.

    Attributes:
        block_k: keys a step.
        slots: steps in flight for each warpgroup.
        tasks_per_core: tasks and key heads to make for each multiprocessor, of many rows.
        least_blocks: a task has at least so many blocks, but for the last of a row.
    """

    block_k: int = 64
    slots: int = 3
    tasks_per_core: int = 4
    least_blocks: int = 4


def config_for(case) -> DecodeConfig:
    """The config tuned for the device, or else one that fits on any Hopper."""
    key = {"cache": case.cache, "head_dim": case.head_dim, "columns": columns_of(case)}
    tuned = tuning.lookup("decode", **key)
    if tuned and (case.page is None or case.page % tuned["block_k"] == 0):
        return DecodeConfig(**tuned)
    return untuned_config(case)


def untuned_config(case) -> DecodeConfig:
    """A config with as many slots as shared memory holds, up to what keeps memory busy."""
    most = 4 if case.cache in STORED else 3  # stored blocks are smaller
    configs = (DecodeConfig(slots=slots) for slots in range(most, 0, -1))
    return next(config for config in configs if smem_bytes(case, config) <= SMEM_BYTES)


def columns_of(case) -> int:
    """R: how many columns the queries of all heads that share keys are, rounded up to a unit."""
    columns = case.queries * case.heads // case.kv_heads
    return -(-columns // COLUMN_UNIT) * COLUMN_UNIT


def smem_bytes(case, config: DecodeConfig) -> int:
    """Shared memory of the kernel: each buffer starts at a multiple of 1024 bytes."""
    total = 0
    for each in jax.tree.leaves(scratch_types(case, config)):
        if isinstance(each, plgpu.Barrier):
            total += 8 * math.prod(jax.tree.leaves(each.num_barriers))
        else:
            total += -(-math.prod(each.shape) * each.dtype.itemsize // 1024) * 1024
    return total


def scratch_types(case, config: DecodeConfig) -> tuple:
    """In the order of the last arguments of `_kernel`."""
    R, d, block, slots = columns_of(case), case.head_dim, config.block_k, WARPGROUPS * config.slots
    parts = 2 if case.cache == "int4" else 1
    stored = STORED.get(case.cache, jnp.bfloat16)
    keys = [tile(slots, block, d // parts, dtype=stored)]
    wide = ()
    if case.cache in STORED:
        keys.append(plgpu.SMEM((slots, block), jnp.float32))
        wide = tuple(tile(WARPGROUPS, block, d // parts) for _ in range(parts))
    return (
        tuple(tile(R, d // parts) for _ in range(parts)),
        plgpu.Barrier(num_arrivals=parts),
        Ring.types((*keys, *keys), users=1),
        tile(WARPGROUPS, R, block),
        wide,
        ColumnReduction.types(WARPGROUPS, block, R),
        plgpu.SMEM((d, R), jnp.float32),
        plgpu.SMEM((R,), jnp.float32),
        plgpu.Barrier(),
    )
