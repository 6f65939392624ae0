"""`paged_attention` on TPUs: many queries, and a cache whose pages are read where they lie.

A tile is a block of queries, of all heads that share a key head. It visits those blocks of its
row's pages of which some query may see a key, and masks only those of which some query does not see
all. The tiles are dealt out to the cores in turn. A core copies blocks ahead of the one that it
attends to, also those of its next tile.

Each block is multiplied with all queries of a tile, some 256 at a time. Quantized keys are widened
once for all of them. Scales multiply scores and probabilities, never keys or values.

Shape letters: B rows, H query heads, K key/value heads, G = H / K, S queries, P pages of the pool,
t keys a page, d head size, n pages of a row; q queries a tile, N pages and T = N * t keys a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arrays import pad_axis
from pallas_kernels.attention.masks import Coords, KeyRange, pad_tokens
from pallas_kernels.attention.tpu_blocks import At, Blocks, scratch
from pallas_kernels.attention.tpu_flash import (
    KeyBlock,
    Softmax,
    Static,
    attend_block,
    column,
    widen_block,
)
from pallas_kernels.attention.tpu_softmax import LOG2E, multiplied_as_stored
from pallas_kernels.attention.tpu_tiles import MOST_ROWS, PagedTpuConfig, Tiles, config_for, plan
from pallas_kernels.choice import Implementation
from pallas_kernels.quantized import STORED, Quantized
from pallas_kernels.tpu import IN_HBM, LANES, VMEM_BYTES, in_hbm, why_not_tpu

LARGEST_HEAD = 256


def why_not(case) -> str | None:
    """Says why the kernel does not serve a `PagedCase`; None if it does."""
    if case.dtype not in ("bfloat16", "float32") or case.cache not in (case.dtype, *STORED):
        return f"it takes bfloat16 or float32, not {case.dtype}, and not a cache of {case.cache}"
    group, block_q = case.heads // case.kv_heads, config_for(case).queries(case.queries)
    if case.head_dim > LARGEST_HEAD or group * block_q > MOST_ROWS:
        return (
            f"{group} query heads of {case.head_dim} numbers for each key head exceed its VMEM: it "
            f"takes head sizes up to {LARGEST_HEAD}"
        )
    if not case.interpret and (case.row % LANES or case.page != LANES):
        return (
            f"it takes pages of {LANES} keys, in rows of a multiple of {LANES} stored numbers, not "
            f"{case.page} in rows of {case.row}: XLA would lay out the pool anew at every call"
        )
    return why_not_tpu(case.interpret)


def paged_tpu(q, k, v, q_range: KeyRange, k_coords: Coords, pages, owner, case, config):
    """Output [B, H, S, d] and log-sum-exp [B, H, S], float32.

    Args:
        pages: those of each row, [B, n].
        owner: the segment of the keys in each, [B, n]; None for their own.
    """
    B, H, S, d = q.shape
    K, block_q = case.kv_heads, config.queries(S)
    q_BKGSd = pad_axis(q, 2, block_q).reshape(B, K, H // K, -1, d)
    q_range = pad_tokens(q_range, block_q)
    cores = min(config.cores, B * K * (q_BKGSd.shape[3] // block_q))
    sizes = block_q, config.pages(case.page), cores
    tiles, entries = plan(q_range, k_coords, pages, owner, K, sizes)
    static = Static(
        scale=case.scale * LOG2E,
        heads=config.heads(S, H // K),
        format=k.format if isinstance(k, Quantized) else None,
        owned=owner is not None,
        paired=case.paired,
    )
    streams = [*jax.tree.leaves((k, v)), *k_coords]
    call = _call(static, q_BKGSd, streams, sizes, config.slots, case)
    out, lse = call(tiles, jnp.stack(q_range, 1), q_BKGSd, entries.list, in_hbm(streams))
    return out.reshape(B, H, -1, d)[:, :, :S], lse.reshape(B, H, -1)[:, :, :S]


def _call(static: Static, q_BKGSd, streams, sizes, slots: int, case):
    """The kernel, which gives the output [B, K, G, S, d] and the log-sum-exp [B, K, G, S]."""
    (B, K, G, S, d), (block_q, pages, cores) = q_BKGSd.shape, sizes

    def tile_at(core, step, tiles: Tiles):
        tile = core * pl.num_programs(1) + step
        return tiles.row[tile], tiles.head[tile], 0, tiles.queries[tile]

    def queries_at(*at):
        row, _, _, queries = tile_at(*at)
        return row, 0, queries

    tile_spec = pl.BlockSpec((1, 1, G, block_q, d), lambda *at: (*tile_at(*at), 0))
    queries_spec = pl.BlockSpec((1, len(KeyRange._fields), block_q), queries_at)
    running = pltpu.VMEM((G, block_q, LANES), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, static),
        out_shape=(
            jax.ShapeDtypeStruct(q_BKGSd.shape, jnp.float32),
            jax.ShapeDtypeStruct(q_BKGSd.shape[:4], jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(cores, -(-B * K * (S // block_q) // cores)),
            in_specs=[queries_spec, tile_spec, IN_HBM, [IN_HBM] * len(streams)],
            out_specs=(tile_spec, pl.BlockSpec((1, 1, G, block_q), tile_at)),
            scratch_shapes=[
                (running, running),
                pltpu.VMEM((2, pages * case.page, d), q_BKGSd.dtype),
                *scratch(streams, pages, slots, one_head=True),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=case.interpret or False,
        name="paged_attention",
    )


def _kernel(
    static: Static, tiles: Tiles, queries_ref, q_ref, list_ref, streams,
    out_ref, lse_ref, running, wide, *copies,
):  # fmt: skip
    core, step = pl.program_id(0), pl.program_id(1)
    tile, visits = core * pl.num_programs(1) + step, tiles.visits
    blocks = Blocks(
        visits, tiles.count[core], list_ref, streams, *copies,
        reads=lambda tile: (tiles.row[tile], tiles.head[tile]),
    )  # fmt: skip
    many = visits.stop[tile] - visits.start[tile]
    first = jnp.where(many > 0, tile, visits.following[tile])
    at = first, visits.start[first]
    pl.when(step == 0)(lambda: blocks.prime(at))
    top, total = running
    softmax = Softmax(top, total, out_ref.at[0, 0])
    softmax.clear()

    def attend(number, at: At) -> None:
        def add(queries: KeyRange | None) -> None:
            block = _key_block(static, blocks, number, tiles.head[tile], wide, queries)
            attend_block(static, q_ref.at[0, 0], block, softmax)

        masked = blocks.masked(at)
        pl.when(masked)(lambda: add(_queries(queries_ref)))
        pl.when(~masked)(lambda: add(None))

    blocks.visit(tiles.number[tile], at, many, attend)
    real = _queries(queries_ref).segment != 0  # padding met blocks without a mask

    @pl.loop(0, q_ref.shape[2])
    def _(head):
        lse_ref[0, 0, pl.ds(head, 1)] = softmax.finish(head, real)


def _queries(queries_ref) -> KeyRange:
    """What each query of the tile sees, [q, 1]."""
    return KeyRange(*(column(queries_ref[0, i : i + 1]) for i in range(queries_ref.shape[1])))


def _key_block(static: Static, blocks: Blocks, number, head, wide, queries) -> KeyBlock:
    """A block as it is multiplied.

    Args:
        wide: room for its keys and values, [2, T, d].
        queries: what they see, to mask the block; None if each of them sees all of it.
    """
    *stored, position, segment = blocks.block(number)
    k, v = stored[:: len(stored) // 2]
    block, masked = KeyBlock(k, v), queries is not None
    spoiled: Any = None  # known where a mask asks for it
    if masked or not multiplied_as_stored(k.dtype, wide.dtype):
        spoiled = widen_block(static, k, v, wide, masked=masked)
        block = KeyBlock(wide.at[0], wide.at[1])
    if static.format:

        def row(scale):
            return static.row(scale[page, pl.ds(head, 1)] for page in range(blocks.pages))

        block = block._replace(k_scale=row(stored[1]), v_scale=row(stored[3]))
    if not masked:
        return block
    return block.masked(queries, _coords(static, blocks, number, position, segment), spoiled)


def _coords(static: Static, blocks: Blocks, number, position, segment) -> Coords:
    """Coordinates of a block's keys, [1, T]; segment 0 for keys of pages that were not copied."""
    filled = blocks.of_entry(number, blocks.entries.filled)

    def segment_of(page: int):
        here = jnp.where(page < filled, segment[page : page + 1], 0)
        if not static.owned:
            return here
        return jnp.where(here != 0, blocks.of_entry(number, blocks.entries.owner + page), 0)

    pages = range(blocks.pages)
    return Coords(
        static.row(position[i : i + 1] for i in pages), static.row(map(segment_of, pages))
    )


IMPLEMENTATION = Implementation("mosaic_tpu", why_not, paged_tpu, PagedTpuConfig, config_for)
