"""Flash attention backward on Hopper, deterministic: one kernel for dq, one for dk and dv.

Both recompute the probabilities from the log-sum-exp, and the compiler lays their exponentials
between the tensor-core instructions of do v^T. With scores s = scale * q k^T:

    p = exp(s - lse)    dv = p^T do    ds = p * (do v^T + shift)    dq = scale * ds k
    shift = d_lse - rowsum(do * out)                                dk = scale * ds^T q

Shape letters: B rows, H query heads, K key/value heads, S queries, T keys, d head size, N tiles; q
and t are the queries and keys that a warpgroup has at once.
"""

import dataclasses
import functools

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
from pallas_kernels.attention.mosaic_forward import COMPUTE, LOG2E
from pallas_kernels.attention.mosaic_masks import (
    BlockOrder,
    CleanFill,
    apply_mask,
    eager,
    lazy,
    load_tokens,
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
    along_columns,
    along_rows,
    flat_grid,
    full,
    grid_indices,
    hopper_kernel,
    tile,
)

TILE = COMPUTE * WARPGROUP  # queries of a block of the dq kernel, keys of one of the other
UNSEEN = 1e30  # stands for the log-sum-exp of a query that saw nothing: exp2(s - this) is 0


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """Keys a step and steps in flight of the dq kernel; queries and steps of the dk, dv kernel."""

    block_k: int = 64
    dq_slots: int = 2
    block_q: int = 64
    dkv_slots: int = 2


def flash_backward(
    saved, d_out, d_lse, q_range: KeyRange, k_coords: Coords, *, scale: float,
    config: BackwardConfig, interpret,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """dq, dk and dv. `saved` is what the forward pass had: q, k, v, out and lse."""
    q, k, v, out, lse = saved
    S, T = q.shape[2], k.shape[2]
    shift = d_lse - jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)
    saw = lse != -jnp.inf
    lse, shift = jnp.where(saw, lse * LOG2E, UNSEEN), jnp.where(saw, shift, 0.0)
    padded = -S % TILE
    stats = jnp.stack(
        [
            jnp.pad(x, ((0, 0), (0, 0), (0, padded)), constant_values=fill)
            for x, fill in ((lse, UNSEEN), (shift, 0.0))
        ],
        axis=2,
    )
    queries = (pad_axis(q, 2, TILE), pad_axis(d_out, 2, TILE), stats)
    k, v, q_range = pad_axis(k, 2, 8), pad_axis(v, 2, 8), pad_tokens(q_range, TILE)
    run = functools.partial(
        hopper_kernel,
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        interpret=interpret,
    )
    mma = Wgmma(interpret is not None)
    dq = _dq(run, mma, scale, config, queries, k, v, q_range, k_coords)
    dk, dv = _dkv(run, mma, scale, config, queries, k, v, q_range, k_coords)
    return dq[:, :, :S], dk[:, :, :T], dv[:, :, :T]


def _dq(run, mma, scale, config: BackwardConfig, queries, k, v, q_range, k_coords):
    (B, H, S, d), K = queries[0].shape, k.shape[1]
    k_coords = pad_tokens(k_coords, config.block_k)
    k_extents = extents(k_coords, config.block_k)
    blocks = block_ranges(*visible_blocks(q_range, k_extents, TILE))
    keys = (tile(config.dq_slots, config.block_k, d),) * 2
    sizes = B, S // TILE, H
    kernel = run(
        functools.partial(_dq_kernel, sizes, H // K, scale, mma),
        out_type=jax.ShapeDtypeStruct(queries[0].shape, k.dtype),
        scratch_types=(
            (tile(COMPUTE, WARPGROUP, d), tile(COMPUTE, WARPGROUP, d)),
            plgpu.Barrier(num_barriers=COMPUTE, num_arrivals=2),
            Ring.types(keys, COMPUTE),
            CleanFill.types(keys),
        ),
        **flat_grid(sizes),
        kernel_name="flash_attention_dq",
    )
    whole = k_extents.whole.astype(jnp.int32)
    return kernel(*queries, k, v, match_no_key(q_range), k_coords, blocks, whole)


def _dq_kernel(
    sizes, group, scale, mma, q_BHSd, do_BHSd, stats_BH2S, k_BKTd, v_BKTd, range_BS, coords_BT,
    ranges_BN, whole_BN, dq_BHSd, q_and_do, filled, ring, landed,
):  # fmt: skip
    b, n, h = grid_indices(sizes)
    n = sizes[1] - 1 - n
    warpgroup = lax.axis_index("warpgroup")
    ring = Ring(*ring)
    order = BlockOrder.load(ranges_BN, b, n)
    block = ring.buffers[0].shape[1]

    def keys_of(step):
        return pl.ds(order.block(step) * block, block)

    @pl.when(warpgroup < COMPUTE)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        mine = pl.ds(n * TILE + warpgroup * WARPGROUP, WARPGROUP)
        q_qd, do_qd = (x.at[warpgroup] for x in q_and_do)
        plgpu.copy_gmem_to_smem(q_BHSd.at[b, h, mine], q_qd, filled.at[warpgroup])
        plgpu.copy_gmem_to_smem(do_BHSd.at[b, h, mine], do_qd, filled.at[warpgroup])
        ring.open()
        q_range = jax.tree.map(lambda x: eager(x.at[b, mine], ROWS), range_BS)
        lse, shift = (load_tokens(stats_BH2S.at[b, h, i, mine], ROWS) for i in range(2))
        plgpu.barrier_wait(filled.at[warpgroup])

        def step(masked, t, dq):
            k_td, v_td = ring.take(t)

            def probabilities(s):
                p = jnp.exp2(s * (scale * LOG2E) - along_rows(lse, s))
                if not masked:
                    return p
                coords = jax.tree.map(lambda x: lazy(x.at[b, keys_of(t)], COLUMNS), coords_BT)
                return apply_mask(p, 0.0, q_range, coords, q_axis=0)

            p = probabilities(mma.dot(q_qd, k_td.T))
            ds = p * mma.add(along_rows(shift, p), do_qd, v_td.T)
            dq = mma.add(dq, ds.astype(k_td.dtype), k_td)
            ring.release(t)
            return dq

        dq = full(q_qd.shape, 0.0, WGMMA)
        dq = lax.fori_loop(0, order.masked, functools.partial(step, True), dq)
        dq = lax.fori_loop(order.masked, order.steps, functools.partial(step, False), dq)
        q_qd[...] = (dq * scale).astype(q_qd.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_qd, dq_BHSd.at[b, h, mine])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == COMPUTE)
    def _move():
        plgpu.set_max_registers(40, action="decrease")

        clean = CleanFill(ring, landed, 2)

        @pl.loop(0, order.steps)
        def _(step):
            number = order.block(step)
            keys = b, lax.div(h, group), pl.ds(number * block, block)
            real = real_keys(coords_BT.segment.at[b], number * block)
            whole = whole_BN[b, number] != 0
            clean.fill(step, (k_BKTd.at[keys], v_BKTd.at[keys]), whole, real)

        ring.drain(order.steps)


def _dkv(run, mma, scale, config: BackwardConfig, queries, k, v, q_range, k_coords):
    (B, K, T, d), H = k.shape, queries[0].shape[1]
    k_coords = pad_tokens(k_coords, TILE)
    some, every = visible_blocks(q_range, extents(k_coords, TILE), config.block_q)
    blocks = block_ranges(jnp.swapaxes(some, 1, 2), jnp.swapaxes(every, 1, 2))
    sizes = B, -(-T // TILE), K
    query_block = tile(config.dkv_slots, config.block_q, d)
    saw = (queries[2][:, :, 0] < UNSEEN).reshape(B, H, -1, config.block_q).all(-1)
    stats = plgpu.SMEM((config.dkv_slots, 2, config.block_q), jnp.float32)
    ranges = plgpu.SMEM((config.dkv_slots, 3, config.block_q), jnp.int32)
    queries_at_once = query_block, query_block, stats, ranges
    kernel = run(
        functools.partial(_dkv_kernel, sizes, H // K, scale, mma),
        out_type=(jax.ShapeDtypeStruct((B, K, sizes[1] * TILE, d), k.dtype),) * 2,
        scratch_types=(
            (tile(COMPUTE, WARPGROUP, d), tile(COMPUTE, WARPGROUP, d)),
            plgpu.Barrier(num_barriers=COMPUTE, num_arrivals=2),
            Ring.types(queries_at_once, COMPUTE),
            CleanFill.types(queries_at_once),
        ),
        **flat_grid(sizes),
        kernel_name="flash_attention_dkv",
    )
    q_range = jnp.stack(match_no_key(q_range), axis=1)
    return kernel(*queries, k, v, q_range, k_coords, blocks, saw.astype(jnp.int32))


def _dkv_kernel(
    sizes, group, scale, mma, q_BHSd, do_BHSd, stats_BH2S, k_BKTd, v_BKTd, range_B3S, coords_BT,
    ranges_BN, saw_BHN, dk_BKTd, dv_BKTd, k_and_v, filled, ring, landed,
):  # fmt: skip
    b, n, h = grid_indices(sizes)  # the keys that most queries see first
    warpgroup = lax.axis_index("warpgroup")
    ring = Ring(*ring)

    @pl.when(warpgroup < COMPUTE)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        mine = pl.ds(n * TILE + warpgroup * WARPGROUP, WARPGROUP)
        k_td, v_td = (x.at[warpgroup] for x in k_and_v)
        plgpu.copy_gmem_to_smem(k_BKTd.at[b, h, mine], k_td, filled.at[warpgroup])
        plgpu.copy_gmem_to_smem(v_BKTd.at[b, h, mine], v_td, filled.at[warpgroup])
        ring.open()
        coords = jax.tree.map(lambda x: eager(x.at[b, mine], ROWS), coords_BT)
        plgpu.barrier_wait(filled.at[warpgroup])

        def step(masked, t, state):
            dk, dv = state
            # Addresses that are found anew at each step: with those of both tiles kept, it spills.
            v_td = k_and_v[1].at[lax.optimization_barrier(warpgroup)]
            q_qd, do_qd, stats_2q, range_3q = ring.take(t)

            def load(ref, like):
                return along_columns(load_tokens(ref, COLUMNS), like)

            def probabilities(s):
                p = jnp.exp2(s * (scale * LOG2E) - load(stats_2q.at[0], s))
                if not masked:
                    return p
                q_range = KeyRange(*(lazy(range_3q.at[i], COLUMNS) for i in range(3)))
                return apply_mask(p, 0.0, q_range, coords, q_axis=1)

            p = probabilities(mma.dot(k_td, q_qd.T))
            ds = p * mma.add(load(stats_2q.at[1], p), v_td, do_qd.T)
            dv = mma.add(dv, p.astype(do_qd.dtype), do_qd)
            dk = mma.add(dk, ds.astype(q_qd.dtype), q_qd)
            # Each thread that has read statistics arrives itself, and the copy that refills their
            # slot waits for all: a load that is done needs no fence, only a store would.
            ring.release(t)
            return dk, dv

        order = BlockOrder.load(ranges_BN, b, n)
        steps, masked_steps = order.steps * group, order.masked * group
        state = (full(k_td.shape, 0.0, WGMMA),) * 2
        state = lax.fori_loop(0, masked_steps, functools.partial(step, True), state)
        dk, dv = lax.fori_loop(masked_steps, steps, functools.partial(step, False), state)
        k_td[...], v_td[...] = (dk * scale).astype(k_td.dtype), dv.astype(v_td.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_td, dk_BKTd.at[b, h, mine])
        plgpu.copy_smem_to_gmem(v_td, dv_BKTd.at[b, h, mine])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == COMPUTE)
    def _move():
        plgpu.set_max_registers(40, action="decrease")

        order = BlockOrder.load(ranges_BN, b, n)
        steps, block = order.steps * group, ring.buffers[0].shape[1]

        clean = CleanFill(ring, landed, 2)

        @pl.loop(0, steps)
        def _(step):  # the query heads that share the keys, one after the other
            head, number = h * group + lax.rem(step, group), order.block(lax.div(step, group))
            queries = pl.ds(number * block, block)
            sources = (
                q_BHSd.at[b, head, queries],
                do_BHSd.at[b, head, queries],
                stats_BH2S.at[b, head, :, queries],
                range_B3S.at[b, :, queries],
            )

            def saw(start):
                lse = stats_BH2S.at[b, head, 0, pl.ds(number * block + start, WARPGROUP)]
                return load_tokens(lse, ROWS) < UNSEEN

            clean.fill(step, sources, saw_BHN[b, head, number] != 0, saw)

        ring.drain(steps)
