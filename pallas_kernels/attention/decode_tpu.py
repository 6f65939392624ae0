"""Decode attention on TPUs: few queries and a long cache, whose pages are read where they lie.

The pages of each row are cut into blocks, and the blocks of all rows are one list, of which every
core takes an equal run. A core copies blocks ahead of the one it attends to: with one copy if the
block's pages follow each other in the pool, otherwise page by page. What cores have of one row is
joined by the log-sum-exp.

The queries of all heads that share keys are the rows of one small tile. Scales of a quantized cache
multiply scores and probabilities, one number a key, never keys or values. int4 comes as two halves
of the head size, each a product of its own, and two keys in a row (`tpu_int4`).

Shape letters: B rows, K key/value heads, P pages of the pool, t keys a page, d head size, R queries
times heads of a group, H of all groups; N pages a block, n blocks of a row, C cores.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.masks import Coords, KeyRange
from pallas_kernels.attention.tpu_blocks import At, Blocks, scratch
from pallas_kernels.attention.tpu_int4 import by_place, rows_of_queries
from pallas_kernels.attention.tpu_plan import DecodeTpuConfig, Runs, config_for, plan
from pallas_kernels.attention.tpu_softmax import (
    LOG2E,
    PageMask,
    Softmax,
    Static,
    Stored,
    attend_head,
    join_cores,
    of_queries,
    page_masks,
    parts_of_queries,
)
from pallas_kernels.choice import Implementation
from pallas_kernels.quantized import STORED, Quantized, in_pairs
from pallas_kernels.tpu import (
    IN_HBM,
    LANES,
    SUBLANES,
    VMEM_BYTES,
    in_hbm,
    mxu_fp8,
    why_not_tpu,
)

MOST_BYTES = VMEM_BYTES // 3  # of all rows' queries and results, which stay on chip


def why_not(case) -> str | None:
    """Says why the kernel does not serve a `DecodeCase`; None if it does."""
    if case.dtype not in ("bfloat16", "float32") or case.cache not in (case.dtype, *STORED):
        return f"it takes bfloat16 or float32, not {case.dtype}, and not a cache of {case.cache}"
    if _resident_bytes(case) > MOST_BYTES:
        return f"{case.rows} rows of {case.queries} queries and {case.heads} heads exceed its VMEM"
    if not case.interpret and (case.row % LANES or case.page not in (None, LANES)):
        return (
            f"it takes pages of {LANES} keys, in rows of a multiple of {LANES} stored numbers, not "
            f"{case.page} in rows of {case.row}: XLA would lay out the pool anew at every call"
        )
    return why_not_tpu(case.interpret)


def _resident_bytes(case) -> int:
    columns = -(-case.queries * case.heads // case.kv_heads // SUBLANES) * SUBLANES
    return 4 * 3 * case.rows * case.kv_heads * columns * max(case.head_dim, LANES)


def decode_tpu(q, k, v, q_range: KeyRange, k_coords: Coords, table, case, config: DecodeTpuConfig):
    """Output [B, H, S, d] and log-sum-exp [B, H, S], float32."""
    B, H, S, d = q.shape
    if table is None:
        out, lse = _of_rows(q, k, v, q_range, k_coords, case, config)
    else:
        out, lse = _decode(q.reshape(B, H * S, d), k, v, q_range, k_coords, table, case, config)
    return out.reshape(B, H, S, d), lse.reshape(B, H, S)


def _decode(q_BHd, k, v, q_range, k_coords, table, case, config):
    """Output [B, H, d] and log-sum-exp [B, H], where H counts heads times queries."""
    (B, H, d), (_, K, page, _) = q_BHd.shape, k.shape
    static = _static(case, k)
    pages = -(-config.pages(page, K) // static.places) * static.places
    cores, slots = config.cores, config.slots
    runs, entries = plan(q_range, k_coords, table, pages, cores)
    streams = [*jax.tree.leaves((k, v)), *k_coords]
    out_type = jax.ShapeDtypeStruct((cores, B, H, d), jnp.float32)
    lse_type = jax.ShapeDtypeStruct((cores, B, H, LANES), jnp.float32)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, static),
        out_shape=(out_type, lse_type),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(cores,),
            in_specs=[
                pl.BlockSpec(q_BHd.shape, lambda core, *_: (0, 0, 0)),
                IN_HBM,
                [IN_HBM] * len(streams),
            ],
            out_specs=[
                pl.BlockSpec((1, *x.shape[1:]), lambda core, *_: (core, 0, 0, 0))
                for x in (out_type, lse_type)
            ],
            scratch_shapes=[
                *scratch(streams, pages, slots),
                _softmax(static, K, H // K, d),
                _scales(static, pages, K, page),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=case.interpret or False,
        name="decode_attention",
    )(runs, q_BHd, entries.list, in_hbm(streams))
    if cores == 1:
        return out[0], lse[0, ..., 0]
    return join_cores(out, lse, interpret=case.interpret)


def _static(case, k) -> Static:
    scale, quantized = case.scale * LOG2E, isinstance(k, Quantized)
    if case.cache != "int4":
        return Static(scale, case.queries, quantized)
    whole_words = k.shape[2] % 4 == 0  # of the bytes of four keys
    fp8 = mxu_fp8() if case.dtype == "bfloat16" and whole_words else None
    return Static(scale, case.queries, quantized, 2, 2 if k.paired else 1, fp8)


def _softmax(static: Static, K: int, R: int, d: int) -> Softmax:
    """The memory of the current row's."""
    rows = R if static.places == 1 else static.places * rows_of_queries(R)
    return Softmax(
        pltpu.VMEM((K, rows, LANES), jnp.float32),
        pltpu.VMEM((K, rows, LANES), jnp.float32),
        pltpu.VMEM((K, static.parts, rows, d * static.places // static.parts), jnp.float32),
    )


def _scales(static: Static, pages: int, K: int, page: int) -> list:
    """The memory of a block's scales of keys and values by place, if keys lie in pairs."""
    shape = static.places, pages // static.places, K, page
    return [] if static.places == 1 else [pltpu.VMEM(shape, jnp.float32)] * 2


def _of_rows(q, k, v, q_range, k_coords, case, config):
    """A cache without pages: each key head of a row is a row whose pages follow each other."""
    B, K, keys, d = k.shape
    page = next(size for size in (LANES, 64, 32, 16, 8, keys) if keys % size == 0)
    pages = B * K * (keys // page)

    def paged(x):  # [B, K, T, ...]
        x = jax.tree.map(lambda leaf: leaf.reshape(pages, 1, -1, *leaf.shape[3:]), x)
        return in_pairs(x) if isinstance(x, Quantized) else x

    def repeated(x):
        return jnp.repeat(x, K, axis=0)

    first, last, segment = map(repeated, q_range)
    position, k_segment = (repeated(x).reshape(pages, page) for x in k_coords)
    return _decode(
        q.reshape(B * K, -1, d),
        paged(k),
        paged(v),
        KeyRange(first, last, segment),
        Coords(position, k_segment),
        jnp.arange(pages, dtype=jnp.int32).reshape(B * K, -1),
        case,
        config,
    )


def _kernel(static: Static, runs: Runs, q_ref, list_ref, streams, out_ref, lse_ref, *memory):
    *copies, softmax, scales = memory
    core = pl.program_id(0)
    count, start = runs.count[core], (runs.row[core], runs.block[core])
    blocks = Blocks(runs.visits, count, list_ref, streams, *copies)
    softmax.clear()
    out_ref[...] = jnp.zeros_like(out_ref)
    lse_ref[...] = jnp.full_like(lse_ref, -jnp.inf)

    def attend(number, at: At) -> None:
        row, block = at
        begins = (number == 0) | (block == runs.visits.start[row])
        _attend(static, runs, blocks, number, at, begins, q_ref, softmax, scales)

        @pl.when((number == count - 1) | (block + 1 >= runs.visits.stop[row]))
        def _():
            softmax.write(static, out_ref.at[0, row], lse_ref.at[0, row])

    blocks.prime(start)
    blocks.visit(0, start, count, attend)


def _attend(static, runs, blocks: Blocks, number, at: At, begins, q_ref, softmax: Softmax, scales):
    """Adds a block to the softmax of every key head."""
    *stored, position, segment = blocks.block(number)
    k, v = _with_scales(static, stored, scales)
    heads = softmax.top.shape[0]
    rows = q_ref.shape[1] // heads

    def add(masks: Sequence[PageMask] | None):
        for head in range(heads):
            of_head = Softmax(*(x.at[head] for x in softmax))
            q = parts_of_queries(static, q_ref[at[0], head * rows : (head + 1) * rows])
            keys, values = (Stored(static, head, *x) for x in (k, v))
            attend_head(q, keys, values, masks, begins, of_head)

    @pl.when(~blocks.masked(at))
    def _():
        add(None)

    @pl.when(blocks.masked(at))
    def _():
        of_place = softmax.top.shape[1] // static.places
        seen = KeyRange(*(of_queries(x, at[0], static.queries, of_place) for x in runs.q_range))
        filled = blocks.of_entry(number, blocks.entries.filled)
        add(page_masks(static, Coords(position, segment), filled, seen))


def _with_scales(static: Static, stored: Sequence[Any], scales: Sequence[Any]) -> list:
    """References to keys and to their scales, and to values and theirs; None without scales."""
    if not static.quantized:
        return [(x, None) for x in stored]
    each = list(zip(stored[::2], stored[1::2], strict=True))
    if static.places == 1:
        return each
    for (_, source), to in zip(each, scales, strict=True):
        to[...] = by_place(source[...])
    return [(x, to) for (x, _), to in zip(each, scales, strict=True)]


IMPLEMENTATION = Implementation("mosaic_tpu", why_not, decode_tpu, DecodeTpuConfig, config_for)
