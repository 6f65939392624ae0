"""A small TPU kernel with a loop over blocks, some of which are masked, and its recorded bundles.

`masked_sums.bundles` and `masked_sums.utilization` are what libtpu 0.0.48 wrote of it for v5p.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compile.absent import absent_tpus, lower_for
from pallas_kernels.compile.bundles import parse_code

BLOCK = 128 * 128 * 2  # bytes of a block of keys
FILE = Path(__file__).with_suffix("")


def recorded():
    """The kernel's code as it was written."""
    return parse_code(*(FILE.with_suffix(x).read_text() for x in (".bundles", ".utilization")))


def compile_sums(topology):
    """Compiles the kernel; returns the optimized HLO."""
    shapes = (
        jax.ShapeDtypeStruct((3,), jnp.int32),
        jax.ShapeDtypeStruct((8, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((64, 128, 128), jnp.bfloat16),
    )
    return lower_for(absent_tpus(topology)[0], masked_sums, *shapes).compile().as_text()


def masked_sums(counts, q, k):
    """Sums q @ k[block] over blocks; from one block on, the last columns are left out.

    Args:
        counts: how many blocks, how many without a mask, how many columns of the others.
        q: [8, 128].
        k: [blocks, 128, 128].
    """
    tile = pl.BlockSpec((8, 128), lambda _, counts: (0, 0))
    return pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[tile, pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=tile,
            scratch_shapes=[
                pltpu.VMEM((2, 128, 128), jnp.bfloat16),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        name="masked_sums",
    )(counts, q, k)


def _kernel(counts, q_ref, k_hbm, out_ref, k_ref, copied):
    def copy(block):
        slot = block & 1
        return pltpu.make_async_copy(k_hbm.at[block], k_ref.at[slot], copied.at[slot])

    out_ref[...] = jnp.zeros_like(out_ref)
    copy(0).start()

    @pl.loop(0, counts[0])
    def _(block):
        @pl.when(block + 1 < counts[0])
        def _():
            copy(block + 1).start()

        copy(block).wait()
        product = functools.partial(jnp.dot, q_ref[...], preferred_element_type=jnp.float32)
        k = k_ref[block & 1]

        @pl.when(block < counts[1])
        def _():
            out_ref[...] += product(k)

        @pl.when(block >= counts[1])
        def _():
            column = jax.lax.broadcasted_iota(jnp.int32, (8, 128), 1)
            out_ref[...] += jnp.where(column < counts[2], product(k), 0.0)
