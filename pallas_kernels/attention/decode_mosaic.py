"""Decode attention on Hopper: few queries, a long cache, read at memory speed.

The queries of all heads that share keys are the columns of one small tile, and keys are the rows of
the tensor cores' products: scores^T = k q^T, out^T = v^T p^T. Each row's keys are cut into tasks of
about equal size over all rows (flash-decoding); each of a task's warpgroups takes every second
block of keys with a running softmax of its own. They are joined by their log-sum-exp: a task's
warpgroups here, a row's tasks in `decode_join`.

Scales of a quantized cache multiply scores and probabilities, one value a key, never keys or
values. int4 comes as two halves of the head size, each a product of its own.

Shape letters: B rows, K key/value heads, T keys, P pages, d head size, R columns (queries times
heads of a group, rounded up to 8), N tasks, W warpgroups; t a block of keys, h a half or the whole
of d.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels.arrays import pad_axis
from pallas_kernels.attention.decode_config import (
    COLUMN_UNIT,
    EARLY_COLUMNS,
    WARPGROUPS,
    DecodeConfig,
    scratch_types,
)
from pallas_kernels.attention.decode_join import decode_join
from pallas_kernels.attention.masks import (
    BlockRanges,
    Coords,
    KeyRange,
    block_ranges,
    extents,
    pad_tokens,
    visible_blocks,
)
from pallas_kernels.attention.mosaic_forward import FIRST_TOP, LOG2E, MASKED
from pallas_kernels.attention.mosaic_masks import (
    BlockOrder,
    apply_mask,
    eager,
    lazy,
    load_tokens,
    match_no_key,
)
from pallas_kernels.attention.pages import extents_of_rows
from pallas_kernels.mosaic import (
    COLUMNS,
    ROWS,
    WGMMA,
    ColumnReduction,
    Ring,
    Wgmma,
    along_columns,
    along_rows,
    full,
    half_masks,
    hopper_kernel,
    whole_power,
    widen,
)
from pallas_kernels.platform import target
from pallas_kernels.quantized import Quantized, unpaired

DEFAULT_CORES = 2  # multiprocessors to plan for where the device has none: the interpreter
FEW_ROWS = 8  # a row and key head for so many multiprocessors: tasks of one row are of one size


class Tasks(NamedTuple):
    """The blocks of a row that each task reads, `begin` up to `end`; none for a spare task."""

    row: Int[Array, "N"]
    begin: Int[Array, "N"]
    end: Int[Array, "N"]


class RowTasks(NamedTuple):
    """The first task of each row, and how many tasks it has."""

    first: Int[Array, "B"]
    count: Int[Array, "B"]


class BlockMask(NamedTuple):
    """What a block of keys that needs a mask does with its scores and values.

    Attributes:
        scores: (step, scores) -> scores, MASKED where a query does not see the key.
        values: (step, x) -> x with zeros for padding: NaN survives a probability of 0.
        padding: which queries are padding.
    """

    scores: Callable
    values: Callable
    padding: jax.Array


def plan_tasks(blocks: Int[Array, "B"], budget: int, least: int) -> tuple[Tasks, RowTasks]:
    """Cuts rows of so many blocks into tasks of nearly equal size.

    Args:
        budget: how many tasks to make, at most; or as many as rows, if those are more.
        least: blocks of a task, but for the last of a row.
    """
    B = blocks.shape[0]
    # A row's last task may be short. Of so many less, all rows together have no more than `budget`.
    whole = max(budget - B, -(-budget // 2))
    size = jnp.maximum(-(-jnp.sum(blocks) // whole), least)
    pieces = -(-blocks // size)
    ends = jnp.cumsum(pieces)
    index = jnp.arange(whole + B, dtype=jnp.int32)
    row = jnp.sum(index[:, None] >= ends, axis=1, dtype=jnp.int32)  # no search: that is a loop
    spare = row == B
    row = jnp.where(spare, 0, row)
    begin = jnp.where(spare, 0, (index - (ends - pieces)[row]) * size)
    end = jnp.where(spare, 0, jnp.minimum(begin + size, blocks[row]))
    return Tasks(row, begin, end), RowTasks(ends - pieces, pieces)


def task_budget(config: DecodeConfig, rows: int, kv_heads: int) -> int:
    """Tasks a key head: one for each multiprocessor where rows are few, otherwise several.

    One is cheapest to join. The tasks of many rows differ in size, and several even that out.
    """
    cores = target().num_cores or DEFAULT_CORES
    few = FEW_ROWS * rows * kv_heads <= cores
    return max(1, cores * (1 if few else config.tasks_per_core) // kv_heads)


def decode_mosaic(q, k, v, q_range: KeyRange, k_coords: Coords, table, case, config: DecodeConfig):
    """Output [B, H, S, d] and log-sum-exp [B, H, S]."""
    if case.page is not None and case.page % config.block_k:
        raise ValueError(
            f"block_k {config.block_k} of the config must divide the page of {case.page} keys."
        )
    B, H, S, d = q.shape
    K, group = case.kv_heads, H // case.kv_heads
    q_range = jax.tree.map(lambda x: jnp.tile(x, (1, group)), q_range)
    q_range = pad_tokens(q_range, COLUMN_UNIT)
    R = q_range.segment.shape[1]
    k_coords = pad_tokens(k_coords, config.block_k)
    extent = extents(k_coords, config.block_k)
    if table is not None:
        extent = extents_of_rows(extent, table)
    blocks = block_ranges(*visible_blocks(q_range, extent, R))
    blocks = BlockRanges(*(x[:, 0] for x in blocks))
    budget = task_budget(config, B, K)
    tasks, of_row = plan_tasks(blocks.stop - blocks.start, budget, config.least_blocks)
    q_BKGd = q.reshape(B, K, group * S, d)
    if (
        group * S > COLUMN_UNIT
    ):  # TMA makes zeros of what a lone unit lacks, not of parts of several
        q_BKGd = pad_axis(q_BKGd, 2, COLUMN_UNIT)
    run = _kernel_call(case, config, (tasks.row.shape[0], K, d, R))
    q_range = match_no_key(q_range)
    outs, lses = run(q_BKGd, _arrays(k), _arrays(v), q_range, k_coords, blocks, tasks, table)
    out, lse = decode_join(outs, lses, *of_row, columns=group * S, interpret=case.interpret)
    return out.reshape(q.shape), lse[:, :, : group * S].reshape(B, H, S)


def _arrays(x) -> tuple:
    """Arrays of a cache that TMA can copy: keys are padded to a multiple of 8."""
    x = unpaired(x)
    arrays = (x.qvalue, x.scale) if isinstance(x, Quantized) else (x,)
    return tuple(pad_axis(array, 2, 8) for array in arrays)


def _kernel_call(case, config: DecodeConfig, shape: tuple[int, int, int, int]):
    """The kernel for [N, K, d, R]: a function of the operands of `_kernel`."""
    N, K, d, R = shape
    return hopper_kernel(
        functools.partial(_kernel, Wgmma(case.interpret is not None), case.scale * LOG2E),
        out_type=(
            jax.ShapeDtypeStruct((N, K, d, R), jnp.float32),
            jax.ShapeDtypeStruct((N, K, R), jnp.float32),
        ),
        scratch_types=scratch_types(case, config),
        grid=(K, N),
        grid_names=("head", "task"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        interpret=case.interpret,
        kernel_name="decode_attention",
    )


def _kernel(
    mma, scale, q_BKGd, k_arrays, v_arrays, range_BR, coords_BT, ranges_B, tasks_N, table_BP,
    out_NKdR, lse_NKR, q_PRh, q_filled, ring, p_WRt, wide_PWth, values_WtR, out_dR, lse_R, joined,
):  # fmt: skip
    n, h = lax.axis_index("task"), lax.axis_index("head")
    warpgroup = lax.axis_index("warpgroup")
    ring = Ring(*ring)
    b, begin, end = (x[n] for x in tasks_N)
    order = BlockOrder.load(ranges_B, b)
    block = p_WRt.shape[2]
    busy = end > begin  # the results of a spare task are not read

    @pl.when(busy & (warpgroup < WARPGROUPS))
    def _compute():
        ring.open(warpgroup, WARPGROUPS)
        q_range = jax.tree.map(lambda x: eager(x.at[b], COLUMNS), range_BR)

        def coords_of(step):
            row, keys = _place(table_BP, k_arrays[0], b, order.block(begin + step), block)
            return jax.tree.map(lambda x: lazy(x.at[row, keys], ROWS), coords_BT)

        def mask_scores(step, scores):
            return apply_mask(scores, MASKED, q_range, coords_of(step), q_axis=1)

        def drop_padding(step, x):
            segment = coords_of(step).segment()
            return jnp.where(along_rows(segment, x) != 0, x, jnp.zeros((), x.dtype))

        mask = BlockMask(mask_scores, drop_padding, q_range.segment() < 0)
        steps = end - begin, jnp.clip(order.masked - begin, 0, end - begin)
        wide = [half.at[warpgroup] for half in wide_PWth]
        plgpu.barrier_wait(q_filled)
        parts = _attend(
            mma, scale, q_PRh, ring, p_WRt.at[warpgroup], wide,
            ColumnReduction(values_WtR.at[warpgroup]), warpgroup, steps, mask,
            half_masks(b) if len(wide) > 1 else (),
        )  # fmt: skip
        _join_warpgroups(warpgroup, parts, out_dR, lse_R, joined)

        @pl.when(warpgroup == 0)
        def _():
            plgpu.copy_smem_to_gmem(out_dR, out_NKdR.at[n, h])
            plgpu.copy_smem_to_gmem(lse_R, lse_NKR.at[n, h])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(busy & (warpgroup == WARPGROUPS))
    def _move():
        # More than there are queries, so the start is no constant.
        columns = pl.ds(lax.mul(h, 0), q_PRh[0].shape[0])
        for part, q in enumerate(q_PRh):
            half = pl.ds(part * q.shape[1], q.shape[1])
            plgpu.copy_gmem_to_smem(q_BKGd.at[b, h, columns, half], q, q_filled)
        plgpu.barrier_wait(q_filled)

        @pl.loop(0, end - begin)
        def _(step):
            row, keys = _place(table_BP, k_arrays[0], b, order.block(begin + step), block)
            ring.fill(step, *(x.at[row, h, keys] for x in (*k_arrays, *v_arrays)))

        ring.drain(end - begin)


def _join_warpgroups(warpgroup, parts, out_dR, lse_R, joined) -> None:
    """Merges the results of the two warpgroups in the first one, through shared memory."""
    outs, lse = parts
    width = outs[0].shape[0]

    def write(outs, lse):
        for part, out in enumerate(outs):
            out_dR[pl.ds(part * width, width)] = out
        lse_R[...] = lse
        plgpu.commit_smem()

    @pl.when(warpgroup == 1)
    def _():
        write(outs, lse)
        plgpu.barrier_arrive(joined)

    @pl.when(warpgroup == 0)
    def _():
        plgpu.barrier_wait(joined)
        other = load_tokens(lse_R, COLUMNS)
        top = jnp.maximum(lse, other)
        mine, others = (jnp.where(x == -jnp.inf, 0.0, jnp.exp(x - top)) for x in (lse, other))
        total = mine + others
        scale = jnp.where(total == 0, 0.0, 1 / total)
        merged = []
        for part, out in enumerate(outs):
            theirs = plgpu.load(
                out_dR.at[pl.ds(part * width, width)], layout=WGMMA, optimized=False
            )
            merged.append(
                out * along_columns(mine * scale, out) + theirs * along_columns(others * scale, out)
            )
        plgpu.commit_smem()  # all have read what is written now
        write(merged, jnp.where(total == 0, -jnp.inf, top + jnp.log(total)))


def _place(table_BP, k_BKTd, row, index, block: int):
    """Where a block of a row's keys lies: in the row itself, or in a page of the pool."""
    if table_BP is None:
        return row, pl.ds(index * block, block)
    blocks_a_page = k_BKTd.shape[2] // block
    page = table_BP[row, lax.div(index, blocks_a_page)]
    return page, pl.ds(lax.rem(index, blocks_a_page) * block, block)


def _attend(
    mma, scale, q_PRh, ring, p_Rt, wide_Pth, reduction, warpgroup, steps, mask, halves
):  # fmt: skip
    """Weighted values, a [h, R] each part, and log-sum-exp [R] of every second step."""
    parts, (R, width) = len(q_PRh), q_PRh[0].shape
    block = p_Rt.shape[1]
    early = wide_Pth and R <= EARLY_COLUMNS
    is_float = jnp.issubdtype(ring.buffers[0].dtype, jnp.floating)

    def step(masked, i, state):
        outs, top, total = state
        t = WARPGROUPS * i + warpgroup
        keys = ring.take(t)
        k_th, v_th = keys[0], keys[len(keys) // 2]
        kept = functools.partial(mask.values, t) if masked else lambda x: x

        def widen_values():
            plgpu.commit_smem()  # a barrier: other warps' products of the last step are done
            for wide, v in zip(wide_Pth, widen(v_th, halves), strict=True):
                wide[...] = kept(v) if is_float else v  # integers are finite, their scales are not

        k_Pth = widen(k_th, halves) if wide_Pth else [k_th]
        products = [(k, q.T) for k, q in zip(k_Pth, q_PRh, strict=True)]
        scores = mma.sum(products, then=widen_values if early else lambda: None) * scale
        if wide_Pth:
            scores = scores * along_rows(load_tokens(keys[1], ROWS), scores)
        if masked:
            scores = mask.scores(t, scores)
        new_top = jnp.maximum(top, whole_power(reduction.max(scores)))
        shrink = jnp.exp2(top - new_top)
        p = jnp.exp2(scores - along_columns(new_top, scores))
        total = total * along_columns(shrink, total) + p
        if wide_Pth:
            p = kept(p * along_rows(load_tokens(keys[3], ROWS), p))
            if not early:
                widen_values()
        elif masked:
            v_th[...] = kept(plgpu.load(v_th, layout=WGMMA))
        p_Rt.T[...] = p.astype(p_Rt.dtype)
        plgpu.commit_smem()
        outs = tuple(out * along_columns(shrink, out) for out in outs)
        outs = mma.add_each(outs, [(v.T, p_Rt.T) for v in wide_Pth or [v_th]])
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
    unseen, total = (top <= FIRST_TOP) | mask.padding, reduction.sum(total)  # NaN stays
    outs = [out * along_columns(jnp.where(unseen, 0.0, 1 / total), out) for out in outs]
    return outs, jnp.where(unseen, -jnp.inf, (top + jnp.log2(total)) / LOG2E)
