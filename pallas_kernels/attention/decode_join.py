"""Joins the tasks that a row's keys were cut into, by their log-sum-exp, in one small kernel.

Shape letters: those of `decode_mosaic`, and t the tasks of a step.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.mosaic_masks import load_tokens
from pallas_kernels.mosaic import (
    COLUMNS,
    WARPGROUP,
    WGMMA,
    Ring,
    along_columns,
    full,
    hopper_kernel,
)

TOGETHER = 8  # tasks of a step: their exponentials overlap
SLOTS = 3
UNSEEN = -1e30  # stands for -inf: differences of the largest are numbers


def decode_join(
    out_NKdR: Float[Array, "N K d R"],
    lse_NKR: Float[Array, "N K R"],
    first: Int[Array, "B"],
    count: Int[Array, "B"],
    *,
    columns: int,
    dtype=jnp.bfloat16,
    interpret=None,
) -> tuple[Float[Array, "B K columns d"], Float[Array, "B K R"]]:
    """Attention of each row, and its log-sum-exp.

    Args:
        out_NKdR, lse_NKR: of each task: values weighted by softmax, and the log-sum-exp.
        first, count: each row's tasks; what other tasks hold is not used.
        columns: those of R that are queries.
    """
    _, K, d, R = out_NKdR.shape
    B = first.shape[0]
    task = plgpu.SMEM((SLOTS, WARPGROUP, R), jnp.float32)
    kernel = hopper_kernel(
        functools.partial(_kernel, columns),
        out_type=(
            jax.ShapeDtypeStruct((B, K, columns, d), dtype),
            jax.ShapeDtypeStruct((B, K, R), jnp.float32),
        ),
        scratch_types=(
            Ring.types((*[task] * TOGETHER, plgpu.SMEM((SLOTS, TOGETHER, R), jnp.float32)), 1),
            plgpu.SMEM((R, WARPGROUP), dtype),
            plgpu.SMEM((R,), jnp.float32),
        ),
        grid=(K, d // WARPGROUP, B),
        grid_names=("head", "part", "row"),
        num_threads=2,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="decode_join",
    )
    return kernel(out_NKdR, lse_NKR, first, count)


def _kernel(
    columns, out_NKdR, lse_NKR, first_B, count_B, joined_BKRd, joined_BKR, ring, staging_Rd, lse_R
):
    b, h, part = (lax.axis_index(name) for name in ("row", "head", "part"))
    ring, warpgroup = Ring(*ring), lax.axis_index("warpgroup")
    first, count = first_B[b], count_B[b]
    steps = lax.div(count + TOGETHER - 1, TOGETHER)
    width = pl.ds(part * WARPGROUP, WARPGROUP)

    @pl.when(warpgroup == 0)
    def _compute():
        ring.open()
        out, lse = _join(ring, steps, count, staging_Rd.shape[0])
        staging_Rd.T[...] = out.astype(staging_Rd.dtype)
        lse_R[...] = lse
        plgpu.commit_smem()
        for column in range(columns):
            plgpu.copy_smem_to_gmem(staging_Rd.at[column], joined_BKRd.at[b, h, column, width])
        pl.when(part == 0)(lambda: plgpu.copy_smem_to_gmem(lse_R, joined_BKR.at[b, h]))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == 1)
    def _move():
        @pl.loop(0, steps)
        def _(step):
            n = first + step * TOGETHER  # TMA makes zeros beyond the last task
            outs = (out_NKdR.at[n + i, h, width] for i in range(TOGETHER))
            ring.fill(step, *outs, lse_NKR.at[pl.ds(n, TOGETHER), h])

        ring.drain(steps)


def _join(ring: Ring, steps, count, R: int) -> tuple[jax.Array, jax.Array]:
    """Output [64, R] and log-sum-exp [R] of one row's tasks, some at a time."""

    def step(t, state):
        out, top, total = state
        *outs_dR, lses_tR = ring.take(t)
        left = count - t * TOGETHER
        lses = [_task_lse(lses_tR, i, left) for i in range(TOGETHER)]
        new_top = functools.reduce(jnp.maximum, lses, top)
        shrink = jnp.exp(top - new_top)
        out, total = out * along_columns(shrink, out), total * shrink
        for out_dR, lse in zip(outs_dR, lses, strict=True):
            weight = jnp.exp(lse - new_top)
            task = plgpu.load(out_dR, layout=WGMMA, optimized=False)
            weighted = task * along_columns(weight, task)
            # Not 0 * x, where x may be anything: what no task of this row wrote.
            counts = along_columns(lse, task) > UNSEEN
            out, total = out + jnp.where(counts, weighted, 0.0), total + weight
        plgpu.commit_smem()  # the interpreter takes TMA's next write for a race
        ring.release(t)
        return out, new_top, total

    state = (
        full((WARPGROUP, R), 0.0, WGMMA),
        full((R,), UNSEEN, COLUMNS),
        full((R,), 0.0, COLUMNS),
    )
    out, top, total = lax.fori_loop(0, steps, step, state)
    unseen = top <= UNSEEN  # NaN is not, and stays
    out = out * along_columns(jnp.where(unseen, 0.0, 1 / total), out)
    return out, jnp.where(unseen, -jnp.inf, top + jnp.log(total))


def _task_lse(lses_tR, index: int, left) -> jax.Array:
    """The log-sum-exp of a task, finite; `UNSEEN` of one that saw nothing or is another row's."""
    lse = load_tokens(lses_tR.at[index], COLUMNS)
    left = lax.broadcast_in_dim(left, lse.shape, [])
    return jnp.where(left > index, jnp.maximum(lse, UNSEEN), UNSEEN)
