"""Few tokens times one or several matrices, which are streamed once, as partial sums in float32.

Tokens are the 64 rows of wgmma, however few: a tile of the matrix takes longer to arrive than to
multiply.

Shape letters: T tokens, rounded up to 8; D in, F out of all matrices together, S parts of D; m the
64 rows, n a tile of 64 outputs, k a step along D.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.arrays import pad_axis
from pallas_kernels.mosaic import COMPILER_PARAMS, WARPGROUP, Ring, accumulate, tile
from pallas_kernels.platform import target

MAX_TOKENS = WARPGROUP
UNIT = 8  # what TMA cuts tokens into
STEP = 64  # inputs
SLOTS = 8  # steps in flight
MOST_PARTS = 4  # of the inputs: whoever adds them up holds all in shared memory
DEFAULT_CORES = 2  # where the device has none: the interpreter


def why_not_few(tokens: int, dtype: str, inputs: int, outputs: Sequence[int]) -> str | None:
    """Why matrices of such widths cannot be multiplied by the kernels here, or None."""
    if tokens > MAX_TOKENS:
        return f"it takes up to {MAX_TOKENS} tokens, not {tokens}"
    if dtype != "bfloat16":
        return f"it takes bfloat16, not {dtype}"
    if inputs % STEP or any(width % STEP for width in outputs):
        return f"it takes widths that are multiples of {STEP}, not {inputs} and {tuple(outputs)}"
    return None


def pad_tokens(x: jax.Array) -> jax.Array:
    """Rows to a multiple of 8, but for fewer: TMA makes zeros of what a lone unit lacks."""
    return x if x.shape[0] < UNIT else pad_axis(x, 0, UNIT)


def tokens_tile(axis: str):
    """All 64 rows of a tile: more than there are tokens, so its start must be no constant.

    TMA makes zeros of the others when it loads, and leaves them out when it stores.
    """
    return pl.ds(lax.mul(lax.axis_index(axis), 0), WARPGROUP)


def parts_of_inputs(inputs: int, tiles: int) -> int:
    """Into how many parts to cut the inputs, so that multiprocessors have something to read."""
    wanted = min(MOST_PARTS, max(1, (target().num_cores or DEFAULT_CORES) // tiles))
    return next(n for n in range(wanted, 0, -1) if inputs % (n * STEP) == 0)


def matmul_few(
    x: Float[Array, "tokens D"],
    weights: tuple[Float[Array, "D _"], ...],
    *,
    parts: int | None = 1,
    interpret=None,
) -> Float[Array, "parts T F"]:
    """x @ each matrix, beside one another, in float32: the product is the sum of `parts` arrays.

    Args:
        x: up to 64 tokens, bfloat16.
        parts: into how many the inputs are cut; None for as many as keep the device busy. Whoever
            uses the product adds them up.
    """
    T, x = -(-x.shape[0] // UNIT) * UNIT, pad_tokens(x)
    tiles = [-(-w.shape[1] // STEP) for w in weights]
    F = sum(w.shape[1] for w in weights)
    parts = parts_of_inputs(x.shape[1], sum(tiles)) if parts is None else parts
    steps = x.shape[1] // (parts * STEP)
    kernel = plgpu.kernel(
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
        compiler_params=COMPILER_PARAMS,
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
    """x times each of `count` matrices [64, 64], summed over steps of a ring from `begin` on.

    The buffers of a step are x and the matrices.
    """

    def multiply(buffers, accumulators):
        x_mk, *weights = buffers
        for acc, w_kn in zip(accumulators, weights, strict=True):
            plgpu.wgmma(acc, x_mk, w_kn)

    return accumulate(ring, steps, multiply, (WARPGROUP, STEP), count, begin)
