"""Decode attention on Hopper: few queries, a long cache, read at memory speed.

The queries of all heads that share keys are the columns of one small tile, and keys are the rows of
the tensor cores' products: scores^T = k q^T, out^T = v^T p^T. Each row's keys are cut into tasks of
about equal size over all rows; each of a task's warpgroups takes every second block of keys with a
running softmax of its own, and all of these are joined by their log-sum-exp.

Scales of a quantized cache multiply scores and probabilities, one value a key, never keys or
values. int4 comes as two halves of the head size, each a product of its own.

Shape letters: B rows, K key/value heads, T keys, P pages, d head size, R columns (queries times
heads of a group, rounded up to 8), N tasks, W warpgroups; t a block of keys, h a half or the whole
of d.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arrays import pad_axis
from pallas_kernels.attention.decode_config import (
    COLUMN_UNIT,
    COMPILER_PARAMS,
    WARPGROUPS,
    DecodeConfig,
    scratch_types,
)
from pallas_kernels.attention.masks import (
    Coords,
    Ranges,
    extents,
    meets,
    pad_tokens,
    ranges,
    reach,
)
from pallas_kernels.attention.merge import lse_weight
from pallas_kernels.attention.mosaic_forward import FIRST_TOP, LOG2E, MASKED
from pallas_kernels.attention.mosaic_masks import BlockOrder, apart, eager, hide, lazy, load_tokens
from pallas_kernels.attention.pages import extents_of_rows
from pallas_kernels.mosaic import (
    COLUMNS,
    ROWS,
    WGMMA,
    Ring,
    Wgmma,
    along_columns,
    along_rows,
    full,
    widen,
)
from pallas_kernels.platform import target
from pallas_kernels.quantized import Quantized

DEFAULT_CORES = 2  # multiprocessors to plan for where the device has none: the interpreter


class Tasks(NamedTuple):
    """Steps `begin` to `end` of a row's blocks, for each task; none for those to spare."""

    row: jax.Array
    begin: jax.Array
    end: jax.Array


def plan_tasks(blocks: jax.Array, budget: int, least: int) -> Tasks:
    """Cuts rows of so many blocks [B] into at most `budget` + B tasks of nearly equal size."""
    size = jnp.maximum(-(-jnp.sum(blocks) // budget), least)
    pieces = -(-blocks // size)
    ends = jnp.cumsum(pieces)
    index = jnp.arange(budget + blocks.shape[0], dtype=jnp.int32)
    row = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
    spare = row == blocks.shape[0]
    row = jnp.where(spare, 0, row)
    begin = jnp.where(spare, 0, (index - (ends - pieces)[row]) * size)
    return Tasks(row, begin, jnp.where(spare, 0, jnp.minimum(begin + size, blocks[row])))


def decode_mosaic(q, k, v, q_coords: Coords, k_coords: Coords, table, case, config: DecodeConfig):
    """Output [B, H, S, d] and log-sum-exp [B, H, S]."""
    if case.page is not None and case.page % config.block_k:
        raise ValueError(
            f"block_k {config.block_k} of the config must divide the page of {case.page} keys."
        )
    B, H, S, d = q.shape
    K, group = case.kv_heads, H // case.kv_heads
    q_BKRd = pad_axis(q.reshape(B, K, group * S, d), 2, COLUMN_UNIT)
    q_reach = reach(q_coords, causal=case.causal, chunk=case.chunk)
    q_reach = jax.tree.map(lambda x: jnp.tile(x, (1, group)), q_reach)
    q_reach = pad_tokens(q_reach, COLUMN_UNIT)
    k_coords = pad_tokens(k_coords, config.block_k)
    extent = extents(k_coords, config.block_k)
    if table is not None:
        extent = extents_of_rows(extent, table)
    blocks = ranges(*meets(q_reach, extent, q_BKRd.shape[2]))
    blocks = Ranges(*(x[:, 0] for x in blocks))
    budget = -(-config.tasks_per_core * (target().num_cores or DEFAULT_CORES) // K)
    tasks = plan_tasks(blocks.stop - blocks.start, budget, config.least_blocks)
    run = _kernel_call(case, config, q_BKRd, tasks.row.shape[0])
    outs, lses = run(q_BKRd, _arrays(k), _arrays(v), apart(q_reach), k_coords, blocks, tasks, table)
    out_BKRd, lse_BKR = _join(outs, lses, tasks.row, B)
    out = out_BKRd[:, :, : group * S].reshape(q.shape).astype(q.dtype)
    return out, lse_BKR[:, :, : group * S].reshape(B, H, S)


def _arrays(x) -> tuple:
    """What TMA copies from: it takes keys in eights."""
    arrays = (x.qvalue, x.scale) if isinstance(x, Quantized) else (x,)
    return tuple(pad_axis(array, 2, 8) for array in arrays)


def _join(out_NWKdR, lse_NWKR, row_N, B: int):
    """Joins the tasks of each row: output [B, K, R, d] and log-sum-exp [B, K, R]."""
    of_row = jnp.arange(B)[:, None] == row_N
    spread = jnp.where(of_row[:, :, None, None, None], lse_NWKR, -jnp.inf)
    top_BKR = jnp.max(spread, (1, 2))
    weight = lse_weight(lse_NWKR, top_BKR[row_N][:, None])
    total = jnp.einsum("bn,nwkr->bkr", of_row.astype(jnp.float32), weight, precision="highest")
    out = jnp.einsum(
        "bn,nwkr,nwkdr->bkrd", of_row.astype(jnp.float32), weight, out_NWKdR, precision="highest"
    )
    found = total > 0
    lse = jnp.where(found, top_BKR + jnp.log(jnp.where(found, total, 1.0)), -jnp.inf)
    return out / jnp.where(found, total, 1.0)[..., None], lse


def _kernel_call(case, config: DecodeConfig, q_BKRd, num_tasks: int):
    """The kernel with its shapes: a function of the operands of `_kernel`."""
    _, K, R, d = q_BKRd.shape
    return plgpu.kernel(
        functools.partial(_kernel, Wgmma(case.interpret is not None), case.scale * LOG2E),
        out_type=(
            jax.ShapeDtypeStruct((num_tasks, WARPGROUPS, K, d, R), jnp.float32),
            jax.ShapeDtypeStruct((num_tasks, WARPGROUPS, K, R), jnp.float32),
        ),
        scratch_types=scratch_types(case, config),
        grid=(num_tasks, K),
        grid_names=("task", "head"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
        interpret=case.interpret,
        kernel_name="decode_attention",
    )


def _kernel(
    mma, scale, q_BKRd, k_arrays, v_arrays, reach_BR, coords_BT, ranges_B, tasks_N, table_BP,
    out_NWKdR, lse_NWKR, q_PRh, q_filled, ring, p_WRt, wide_PWth, out_WdR, lse_WR,
):  # fmt: skip
    n, h = lax.axis_index("task"), lax.axis_index("head")
    warpgroup = lax.axis_index("warpgroup")
    ring = Ring(*ring)
    b, begin, end = (x[n] for x in tasks_N)
    order = BlockOrder.load(ranges_B, b)
    block = p_WRt.shape[2]

    @pl.when(warpgroup < WARPGROUPS)
    def _compute():
        ring.open(warpgroup, WARPGROUPS)
        reach = jax.tree.map(lambda x: eager(x.at[b], COLUMNS), reach_BR)

        def mask(step, scores):
            row, keys = _place(table_BP, k_arrays[0], b, order.block(begin + step), block)
            coords = jax.tree.map(lambda x: lazy(x.at[row, keys], ROWS), coords_BT)
            return hide(scores, MASKED, reach, coords, q_axis=1)

        real = reach.segment() >= 0
        steps = end - begin, jnp.clip(order.masked - begin, 0, end - begin)
        wide = [half.at[warpgroup] for half in wide_PWth]
        plgpu.barrier_wait(q_filled)
        outs, log_sum = _attend(
            mma, scale, q_PRh, ring, p_WRt.at[warpgroup], wide, warpgroup, steps, mask, real
        )
        width = outs[0].shape[0]
        for part, out in enumerate(outs):
            out_WdR[warpgroup, pl.ds(part * width, width)] = out
        lse_WR[warpgroup] = log_sum
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_WdR.at[warpgroup], out_NWKdR.at[n, warpgroup, h])
        plgpu.copy_smem_to_gmem(lse_WR.at[warpgroup], lse_NWKR.at[n, warpgroup, h])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == WARPGROUPS)
    def _move():
        for part, q in enumerate(q_PRh):
            columns = pl.ds(part * q.shape[1], q.shape[1])
            plgpu.copy_gmem_to_smem(q_BKRd.at[b, h, :, columns], q, q_filled)
        plgpu.barrier_wait(q_filled)

        @pl.loop(0, end - begin)
        def _(step):
            row, keys = _place(table_BP, k_arrays[0], b, order.block(begin + step), block)
            ring.fill(step, *(x.at[row, h, keys] for x in (*k_arrays, *v_arrays)))

        ring.drain(end - begin)


def _place(table_BP, k_BKTd, row, index, block: int):
    """Where a block of a row's keys lies: in the row itself, or in a page of the pool."""
    if table_BP is None:
        return row, pl.ds(index * block, block)
    blocks_a_page = k_BKTd.shape[2] // block
    page = table_BP[row, lax.div(index, blocks_a_page)]
    return page, pl.ds(lax.rem(index, blocks_a_page) * block, block)


def _attend(mma, scale, q_PRh, ring, p_Rt, wide_Pth, warpgroup, steps, mask, real):
    """Weighted values, a [h, R] each part, and log-sum-exp [R] of every second step."""
    parts, (R, width) = len(q_PRh), q_PRh[0].shape
    block = p_Rt.shape[1]

    def step(masked, i, state):
        outs, top, total = state
        t = WARPGROUPS * i + warpgroup
        keys = ring.take(t)
        k_th, v_th = keys[0], keys[len(keys) // 2]
        scores = None
        for part in range(parts):
            k = widen(k_th, part, parts) if wide_Pth else k_th
            q = q_PRh[part].T
            scores = mma.dot(k, q) if scores is None else mma.add(scores, k, q)
        scores = scores * scale
        if wide_Pth:
            scores = scores * along_rows(load_tokens(keys[1], ROWS), scores)
        if masked:
            scores = mask(t, scores)
        new_top = jnp.maximum(top, scores.max(axis=0))
        shrink = jnp.exp2(top - new_top)
        p = jnp.exp2(scores - along_columns(new_top, scores))
        total = total * along_columns(shrink, total) + p
        if wide_Pth:
            p = p * along_rows(load_tokens(keys[3], ROWS), p)
            for part, wide in enumerate(wide_Pth):
                wide[...] = widen(v_th, part, parts)
        p_Rt.T[...] = p.astype(p_Rt.dtype)
        plgpu.commit_smem()
        outs = tuple(
            mma.add(out * along_columns(shrink, out), v.T, p_Rt.T)
            for out, v in zip(outs, wide_Pth or [v_th], strict=True)
        )
        ring.release(t)
        return outs, new_top, total

    every, masked = (lax.div(x + (WARPGROUPS - 1) - warpgroup, WARPGROUPS) for x in steps)
    state = (
        (full((width, R), 0.0, WGMMA),) * parts,
        full((R,), FIRST_TOP, COLUMNS),
        full((block, R), 0.0, WGMMA),
    )
    state = lax.fori_loop(0, masked, functools.partial(step, True), state)
    outs, top, total = lax.fori_loop(masked, every, functools.partial(step, False), state)
    found, total = (top > FIRST_TOP) & real, total.sum(axis=0)
    outs = [out * along_columns(jnp.where(found, 1 / total, 0.0), out) for out in outs]
    return outs, jnp.where(found, (top + jnp.log2(total)) / LOG2E, -jnp.inf)
