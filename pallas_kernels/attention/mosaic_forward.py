"""Flash attention forward on Hopper: two warpgroups compute, a third moves keys and values.

The compute warpgroups hand each other the turn at the tensor cores. Each takes the softmax of a
block while its own probabilities of the block before are multiplied by values.

Shape letters: B rows, H query heads, K key/value heads, S queries, T keys, d head size, N tiles of
queries; q is the 64 queries of one warpgroup, t a block of keys.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arrays import pad_axis
from pallas_kernels.attention.masks import (
    Coords,
    KeyRange,
    block_ranges,
    extents,
    pad_tokens,
    visible_blocks,
)
from pallas_kernels.attention.mosaic_masks import (
    BlockOrder,
    CleanFill,
    apply_mask,
    eager,
    lazy,
    match_no_key,
    real_keys,
)
from pallas_kernels.mosaic import (
    COLUMNS,
    ROWS,
    WARPGROUP,
    WGMMA,
    Ring,
    Wgmma,
    along_rows,
    flat_grid,
    full,
    grid_indices,
    hopper_kernel,
    tile,
    whole_power,
)

LOG2E = math.log2(math.e)
# Finite, so that exp2(score - running_max) never meets inf - inf; and below the first maximum, so
# that a masked score counts nothing while no other was seen.
MASKED, FIRST_TOP = -1e30, -0.5e30
COMPUTE = 2  # warpgroups that compute
TILE_Q = COMPUTE * WARPGROUP


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Keys a block, and blocks in flight."""

    block_k: int = 128
    slots: int = 2


def flash_forward(
    q, k, v, q_range: KeyRange, k_coords: Coords, *, scale: float, config: ForwardConfig, interpret
) -> tuple[jax.Array, jax.Array]:
    """Output [B, H, S, d] and natural log-sum-exp [B, H, S]."""
    (B, H, S, d), K = q.shape, k.shape[1]
    q, q_range = pad_axis(q, 2, TILE_Q), pad_tokens(q_range, TILE_Q)
    k, v, k_coords = pad_axis(k, 2, 8), pad_axis(v, 2, 8), pad_tokens(k_coords, config.block_k)
    k_extents = extents(k_coords, config.block_k)
    blocks = block_ranges(*visible_blocks(q_range, k_extents, TILE_Q))
    keys = (tile(config.slots, config.block_k, d),)
    sizes = B, q.shape[2] // TILE_Q, H
    kernel = hopper_kernel(
        functools.partial(_kernel, sizes, H // K, scale * LOG2E, Wgmma(interpret is not None)),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        ),
        scratch_types=(
            tile(COMPUTE, WARPGROUP, d),
            tile(COMPUTE, 2, WARPGROUP, config.block_k),
            plgpu.SMEM((COMPUTE, WARPGROUP), jnp.float32),
            plgpu.Barrier(num_barriers=COMPUTE),
            Ring.types(keys, COMPUTE),
            Ring.types(keys, COMPUTE),
            CleanFill.types(keys),
            plgpu.Barrier(num_barriers=COMPUTE),
        ),
        **flat_grid(sizes),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="flash_attention_forward",
    )
    q_range, whole = match_no_key(q_range), k_extents.whole.astype(jnp.int32)
    out, lse = kernel(q, k, v, q_range, k_coords, blocks, whole)
    return out[:, :, :S], lse[:, :, :S]


def _kernel(
    sizes, group, scale, mma, q_BHSd, k_BKTd, v_BKTd, range_BS, coords_BT, ranges_BN, whole_BN,
    out_BHSd, lse_BHS, q_qd, p_2qt, lse_q, q_filled, k_ring, v_ring, v_landed, turns,
):  # fmt: skip
    b, n, h = grid_indices(sizes)  # heads that share keys run side by side
    n = sizes[1] - 1 - n  # the longest tiles of a causal mask first
    warpgroup = lax.axis_index("warpgroup")
    k_ring, v_ring = Ring(*k_ring), Ring(*v_ring)
    order = BlockOrder.load(ranges_BN, b, n)

    @pl.when(warpgroup < COMPUTE)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        mine = pl.ds(n * TILE_Q + warpgroup * WARPGROUP, WARPGROUP)
        q, p, lse, filled = (x.at[warpgroup] for x in (q_qd, p_2qt, lse_q, q_filled))
        plgpu.copy_gmem_to_smem(q_BHSd.at[b, h, mine], q, filled)
        k_ring.open()
        v_ring.open()
        plgpu.barrier_wait(filled)
        q_range = jax.tree.map(lambda x: eager(x.at[b, mine], ROWS), range_BS)

        def mask(step, scores):
            block = scores.shape[1]
            keys = pl.ds(order.block(step) * block, block)
            coords = jax.tree.map(lambda x: lazy(x.at[b, keys], COLUMNS), coords_BT)
            return apply_mask(scores, MASKED / scale, q_range, coords, q_axis=0)

        padding = q_range.segment() < 0
        out, log_sum = _attend(
            mma, scale, q, p, k_ring, v_ring, turns, warpgroup, order, mask, padding
        )
        q[...] = out.astype(q.dtype)
        lse[...] = log_sum
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, out_BHSd.at[b, h, mine])
        plgpu.copy_smem_to_gmem(lse, lse_BHS.at[b, h, mine])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == COMPUTE)
    def _move():
        plgpu.set_max_registers(40, action="decrease")
        block = k_ring.buffers[0].shape[1]
        steps = jnp.maximum(order.steps, 1)
        values = CleanFill(v_ring, v_landed, 1)

        @pl.loop(0, steps)
        def _(step):
            number = order.block(step)
            keys = b, lax.div(h, group), pl.ds(number * block, block)
            real = real_keys(coords_BT.segment.at[b], number * block)
            k_ring.fill(step, k_BKTd.at[keys])
            values.fill(step, (v_BKTd.at[keys],), whole_BN[b, number] != 0, real)

        k_ring.drain(steps)
        v_ring.drain(steps)


def _attend(mma, scale, q_qd, p_2qt, k_ring, v_ring, turns, warpgroup, order, mask, padding):
    """Softmax-weighted values [q, d] and log-sum-exp [q] of one warpgroup's queries.

    A step multiplies by its keys and, behind that, by the values of the step before it.
    """
    mine, other = turns.at[warpgroup], turns.at[1 - warpgroup]
    steps = jnp.maximum(order.steps, 1)  # a block that no query sees is masked whole

    def p_at(t):
        return p_2qt.at[lax.rem(t, 2)]

    def softmax(masked, t, top, total, scores):
        """The probabilities go to shared memory: in registers, ptxas makes products wait."""
        k_ring.release(t)
        if masked:
            scores = mask(t, scores)
        new_top = jnp.maximum(top, whole_power(scores.max(axis=1) * scale))
        shrink = jnp.exp2(top - new_top)
        p = jnp.exp2(scores * scale - along_rows(new_top, scores))
        p_at(t)[...] = p.astype(q_qd.dtype)
        plgpu.commit_smem()  # also keeps all of the above before the wait for the second product
        return new_top, total * shrink + p.sum(axis=1), shrink

    def step(masked, t, state):
        out, top, total, shrink = state
        k_td, v_td = k_ring.take(t), v_ring.take(t - 1)
        plgpu.barrier_wait(mine)
        state, out = mma.dot_and_add(
            (q_qd, k_td.T),
            functools.partial(softmax, masked, t, top, total),
            lambda: out * along_rows(shrink, out),
            (p_at(t - 1), v_td),
            then=lambda: plgpu.barrier_arrive(other),
        )
        v_ring.release(t - 1)
        return out, *state

    pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(other))
    k_td = k_ring.take(0)
    plgpu.barrier_wait(mine)
    scores = mma.dot(q_qd, k_td.T, then=lambda: plgpu.barrier_arrive(other))
    begin = full(q_qd.shape[:1], FIRST_TOP, ROWS), full(q_qd.shape[:1], 0.0, ROWS)
    state = full(q_qd.shape, 0.0, WGMMA), *softmax(True, 0, *begin, scores)
    state = lax.fori_loop(1, order.masked, functools.partial(step, True), state)
    first = jnp.maximum(order.masked, 1)
    state = lax.fori_loop(first, steps, functools.partial(step, False), state)
    out, top, total, shrink = state
    v_td = v_ring.take(steps - 1)
    plgpu.barrier_wait(mine)
    # No warpgroup waits for a turn after the second warpgroup's last one.
    hand_on = functools.partial(pl.when(warpgroup == 0), lambda: plgpu.barrier_arrive(other))
    out = mma.add(out * along_rows(shrink, out), p_at(steps - 1), v_td, then=hand_on)
    v_ring.release(steps - 1)
    nothing = (total == 0) | padding  # padding met blocks without a mask
    out = jnp.where(along_rows(nothing, out), 0.0, out * along_rows(1 / total, out))
    return out, jnp.where(nothing, -jnp.inf, (top + jnp.log2(total)) / LOG2E)
