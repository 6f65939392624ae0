"""Multiplies up to 64 tokens by one or several matrices, each of which is read once.

Tokens always take all 64 rows of wgmma: a tile of the matrix takes longer to arrive from memory
than to multiply. The product may be returned as partial sums over parts of the inputs.

Shape letters: T tokens, rounded up to 8; D inputs, F outputs of all matrices together, S parts of
D; m the 64 rows, n a tile of 64 outputs, k a step along D.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.arrays import pad_axis
from pallas_kernels.mosaic import WARPGROUP, Ring, accumulate, hopper_kernel, tile
from pallas_kernels.platform import target
from pallas_kernels.step.tpu_matmul import matmul_tpu
from pallas_kernels.tpu import LANES, why_not_tpu

MAX_TOKENS = WARPGROUP
UNIT = 8  # rows of a tile that TMA copies at once
STEP = 64  # inputs that one step of the pipeline multiplies
SLOTS = 8  # pipeline depth, in steps
MOST_PARTS = 4  # parts of the inputs, whose partial sums the reader holds in shared memory
DEFAULT_CORES = 2  # multiprocessors assumed for devices without, such as a CPU's interpreter


def why_not_few(tokens: int, dtype: str, inputs: int, outputs: Sequence[int]) -> str | None:
    """Says why the kernels of `step` cannot multiply by matrices of these sizes; None if they can.

    Args:
        tokens: how many tokens are multiplied.
        dtype: of tokens and matrices.
        inputs: rows of the matrices.
        outputs: columns of each matrix.
    """
    if tokens > MAX_TOKENS:
        return f"it takes up to {MAX_TOKENS} tokens, not {tokens}"
    if dtype != "bfloat16":
        return f"it takes bfloat16, not {dtype}"
    if inputs % STEP or any(width % STEP for width in outputs):
        return f"it takes widths that are multiples of {STEP}, not {inputs} and {tuple(outputs)}"
    return None


def why_not_widths(outputs: Sequence[int]) -> str | None:
    """Says why the TPU kernels cannot multiply by matrices of so many outputs; None if they can."""
    if any(width % LANES for width in outputs):
        return f"on TPUs it takes widths that are multiples of {LANES}, not {tuple(outputs)}"
    return None


def pad_tokens(x: jax.Array) -> jax.Array:
    """Pads tokens to a multiple of 8, unless there are fewer: TMA reads zeros for those missing."""
    return x if x.shape[0] < UNIT else pad_axis(x, 0, UNIT)


def tokens_tile(axis: str):
    """The slice of 64 token rows, from 0 on.

    There may be fewer tokens: TMA reads zeros beyond the last one and writes nothing there. The
    start is computed from an axis index, since Pallas refuses constant slices that are too long.
    """
    return pl.ds(lax.mul(lax.axis_index(axis), 0), WARPGROUP)


def parts_of_inputs(inputs: int, tiles: int) -> int:
    """How many parts to cut the inputs into, so that parts * tiles occupies all multiprocessors."""
    wanted = min(MOST_PARTS, max(1, (target().num_cores or DEFAULT_CORES) // tiles))
    return next(n for n in range(wanted, 0, -1) if inputs % (n * STEP) == 0)


def matmul_few(
    x: Float[Array, "tokens *inputs"],
    weights: tuple[Any, ...],
    *,
    parts: int | None = 1,
    interpret=None,
) -> Float[Array, "parts T F"]:
    """x @ concatenate(weights, axis=1) in float32, as partial sums that the caller adds up.

    Args:
        x: up to 64 tokens, with D inputs on one axis, or on two of heads; rounded to bfloat16.
        weights: matrices [D, *outputs], bfloat16. Each has a multiple of 64 outputs, or fewer than
            64; all together have a multiple of 32, or fewer: what TMA cuts arrays into. On TPUs
            each has a multiple of 128, or one alone has fewer, and they may be `QuantizedMatrix`.
        parts: into how many parts the inputs are cut; None for as many as occupy the device. On
            TPUs it is one.
        interpret: parameters of an interpreter, or None.
    """
    if why_not_tpu(interpret) is None:
        return matmul_tpu(x, weights, interpret=interpret)
    weights = tuple(w.reshape(w.shape[0], -1) for w in weights)
    x = pad_tokens(x.reshape(x.shape[0], -1).astype(jnp.bfloat16))
    T = -(-x.shape[0] // UNIT) * UNIT
    tiles = tuple(-(-w.shape[1] // STEP) for w in weights)
    F = sum(w.shape[1] for w in weights)
    parts = parts_of_inputs(x.shape[1], sum(tiles)) if parts is None else parts
    steps = x.shape[1] // (parts * STEP)
    kernel = hopper_kernel(
        functools.partial(_kernel, tiles, steps),
        out_type=jax.ShapeDtypeStruct((parts, T, F), jnp.float32),
        scratch_types=(
            Ring.types((tile(SLOTS, WARPGROUP, STEP), tile(SLOTS, STEP, STEP)), 1),
            plgpu.SMEM((WARPGROUP, STEP), jnp.float32),
        ),
        grid=(parts, sum(tiles)),
        grid_names=("part", "tile"),
        num_threads=2,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="matmul_few",
    )
    return kernel(x, weights)


def _kernel(tiles, steps, x_TD, weights_DF, out_STF, ring, out_mn):
    part, index = lax.axis_index("part"), lax.axis_index("tile")
    ring, warpgroup = Ring(*ring), lax.axis_index("warpgroup")
    tokens = tokens_tile("tile")

    @pl.when(warpgroup == 0)
    def _compute():
        ring.open()
        (out_mn[...],) = products(ring, steps, 1)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_mn, out_STF.at[part, tokens, pl.ds(index * STEP, STEP)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    first = 0
    for w_DF, count in zip(weights_DF, tiles, strict=True):

        @pl.when((warpgroup == 1) & (index >= first) & (index < first + count))
        def _move(w_DF=w_DF, first=first):
            outputs = pl.ds((index - first) * STEP, STEP)

            @pl.loop(0, steps)
            def _(step):
                k = pl.ds((part * steps + step) * STEP, STEP)
                ring.fill(step, x_TD.at[tokens, k], w_DF.at[k, outputs])

            ring.drain(steps)

        first += count


def products(ring: Ring, steps, count: int, begin=0) -> list[jax.Array]:
    """Sums x @ w over the steps of a ring, from step `begin` on, for each of `count` matrices w.

    A step's buffers are a tile of x and a tile of each matrix, all [64, 64].
    """

    def multiply(buffers, accumulators):
        x_mk, *weights = buffers
        for acc, w_kn in zip(accumulators, weights, strict=True):
            plgpu.wgmma(acc, x_mk, w_kn)

    return accumulate(ring, steps, multiply, (WARPGROUP, STEP), count, begin)
