"""TPU kernels of `jaxmoe benchmark schedule`: jaxmoe's and JAX's own, at Llama 4's sizes.

A case is a program with a Pallas kernel, and what an iteration of its hot loop copies from memory
or multiplies, as its block sizes say.
"""

import dataclasses
import functools
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.benchmarks.attention.cases import CHUNK, HEAD_DIM, HEADS, KV_HEADS, SCALE
from jaxmoe.benchmarks.schedule.cases import (
    ELEMENT_BYTES,
    EXPERTS,
    OURS,
    TOKENS,
    Case,
    D,
    F,
    coords,
    shaped,
)
from pallas_kernels.attention import (
    Coords,
    decode_attention,
    flash_attention,
    paged_attention,
    tpu_plan,
    tpu_tiles,
)
from pallas_kernels.attention.decode import DecodeCase
from pallas_kernels.attention.paged import PagedCase
from pallas_kernels.experts import grouped_matmul
from pallas_kernels.experts.grouped_tpu import GroupedTpuConfig
from pallas_kernels.quantized import in_pairs, quantize, quantize_matrix
from pallas_kernels.tpu import VMEM_BYTES, mxu_fp8, num_cores

PAGE = 128  # keys a page
BLOCK = 4096 // PAGE  # pages a block of JAX's kernels for one key head: as many as ours of one row
SCALE_BYTES = 4  # of a quantized key's, or value's, scale
DTYPES = {"bf16": jnp.bfloat16, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
# Outputs of a tile by rows of a block and format: those that grouped_matmul chooses for two cores.
OUTPUTS = {
    128: {"bf16": 512, "int8": 1024, "fp8": 1024, "int4": 1024},
    8: {"bf16": 128, "int8": 256, "fp8": 256, "int4": 512},
}
MEGABLOX = 512, 1024, 1024  # rows, inputs and outputs of a tile of JAX's
FLASH = 1024  # queries, and keys, of a block of splash attention: those of flash_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuCase(Case):
    """A program whose Pallas kernel with the most products is analyzed.

    `by` is jaxmoe, or a module of `jax.experimental.pallas.ops.tpu`.

    Attributes:
        block: the sizes of a block, in words.
        copied: bytes that an iteration of the hot loop copies from memory.
        useful: bytes of these that hold what was asked for, if they are not all.
        flops: operations of an iteration's matrix products; 0 if they do not fill the units.
        dearest: what the dearest path does, if the hot loop has several with products.
    """

    block: str
    copied: float | int
    useful: float | int | None = None
    flops: int = 0
    dearest: str = "masked"


class Cache(NamedTuple):
    """What queries read: the keys of rows, and how many heads they and the queries have."""

    name: str
    rows: int
    keys: int
    kv_heads: int = 1
    queries: int = 1

    @property
    def heads(self) -> int:
        """How many heads the queries have."""
        return HEADS // KV_HEADS * self.kv_heads

    @property
    def pages(self) -> int:
        """How many pages the pool has, with one of padding."""
        return self.rows * self.keys // PAGE + 1

    @property
    def table(self) -> jax.ShapeDtypeStruct:
        """The pages of each row."""
        return shaped(self.rows, self.keys // PAGE, dtype=jnp.int32)


DECODING = (
    Cache("decode", 1, 2**20),
    Cache("decode-8-heads", 1, 2**20, KV_HEADS),
    Cache("decode-64-rows", 64, 16384),
)
PREFILL = Cache("prefill", 1, 2**20, queries=8192)


def all_cases() -> list[TpuCase]:
    """All cases; kernels that compute the same follow one another."""
    return [*_decoding(), *_prefilling(), *_experts(), *_attention()]


def _decoding() -> Iterator[TpuCase]:
    for cache in DECODING:
        for format in ELEMENT_BYTES:
            yield _decode_case(cache, format)
            if format in DTYPES:
                yield _ragged_case(cache, format, keys=BLOCK * PAGE)
            if format in ("bf16", "int8"):
                yield _paged_case(cache, format)


def _prefilling() -> Iterator[TpuCase]:
    """A chunk of queries to a long cache: the steady state is within a tile of queries."""
    for format in ELEMENT_BYTES:
        yield _prefill_case(PREFILL, format)
        if format in DTYPES:
            yield _ragged_case(PREFILL, format, keys=BLOCK * PAGE // 2, queries=256)


def _of_cache(cache: Cache, format: str, by: str, function, shapes, keys, **sizes):
    """A case of queries to a cache.

    Args:
        cache, format: what is read.
        by, function, shapes: as of `TpuCase`.
        keys: how many keys an iteration copies, each of one head, with their values.
        **sizes: `copied`, and perhaps `useful`, bytes of a key; perhaps `queries` of an iteration.
    """
    queries = sizes.pop("queries", 0)
    sizes = {name: 2 * keys * each for name, each in sizes.items()}
    if queries:
        sizes["flops"] = 2 * 2 * queries * (cache.heads // cache.kv_heads) * keys * HEAD_DIM
    block = f"{queries} queries, {keys} keys" if queries else f"{keys} keys"
    return TpuCase(f"{cache.name}-{format}", by, function, shapes, block=block, **sizes)


def _ours(cache: Cache, format: str) -> tuple[Any, float, tuple]:
    """A pool of pages of our own, bytes of a key in it, and what DecodeCase and PagedCase share."""
    pool: Any = shaped(cache.pages, cache.kv_heads, PAGE, HEAD_DIM)
    scale = 0 if format == "bf16" else SCALE_BYTES
    if format != "bf16":
        pool = jax.eval_shape(lambda x: in_pairs(quantize(x, format)), pool)
    stored = "bfloat16" if format == "bf16" else format
    facts = cache.rows, cache.heads, cache.kv_heads, cache.queries, cache.keys, HEAD_DIM
    facts = *facts, "bfloat16", stored, PAGE, SCALE
    return pool, HEAD_DIM * ELEMENT_BYTES[format] + scale, facts


def _shapes(cache: Cache, pool) -> tuple:
    """The arguments of our kernels, but for the segments."""
    q = shaped(cache.rows, cache.heads, cache.queries, HEAD_DIM)
    of_queries, of_keys = coords(cache.rows, cache.queries), coords(cache.pages, PAGE)
    return q, pool, pool, of_queries, of_keys, cache.table


def _decode_case(cache: Cache, format: str) -> TpuCase:
    pool, copied, facts = _ours(cache, format)
    keys = tpu_plan.config_for(DecodeCase(*facts)).block_k
    return _of_cache(cache, format, OURS, _decode, _shapes(cache, pool), keys, copied=copied)


def _decode(q, k, v, q_coords, k_coords, table):
    return decode_attention(
        q, k, v, q_coords, k_coords, table=table, scale=SCALE, implementation="mosaic_tpu"
    )


def _prefill_case(cache: Cache, format: str) -> TpuCase:
    pool, copied, facts = _ours(cache, format)
    config = tpu_tiles.config_for(PagedCase(*facts))
    sizes = {"copied": copied, "queries": config.queries(cache.queries)}
    shapes = _shapes(cache, pool)
    return _of_cache(cache, format, OURS, _prefill, shapes, config.block_k, **sizes)


def _prefill(q, k, v, q_coords, k_coords, table):
    return paged_attention(
        q, k, v, q_coords, k_coords, table, scale=SCALE, implementation="mosaic_tpu"
    )


def _ragged_case(cache: Cache, format: str, *, keys: int, queries: int = 1) -> TpuCase:
    """JAX's ragged paged attention: keys and values share pages, and one scale if quantized."""
    pool = shaped(cache.pages, PAGE, 2 * cache.kv_heads, HEAD_DIM, dtype=DTYPES[format])
    lengths, starts, count = (shaped(n, dtype=jnp.int32) for n in (cache.rows, cache.rows + 1, 1))
    sizes = {"num_kv_pages_per_block": keys // PAGE // cache.kv_heads}
    sizes["num_queries_per_block"] = queries
    scale = None if format == "bf16" else 1.0
    function = functools.partial(_ragged, scale=scale, sizes=sizes)
    q = shaped(cache.rows * cache.queries, cache.heads, HEAD_DIM)
    shapes = q, pool, lengths, cache.table, starts, count
    by, copied = "ragged_paged_attention", HEAD_DIM * ELEMENT_BYTES[format]
    tile = {"queries": queries} if cache.queries > 1 else {}
    return _of_cache(cache, format, by, function, shapes, keys, copied=copied, **tile)


def _ragged(q, pool, lengths, table, starts, count, *, scale, sizes):
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as module

    return module.ragged_paged_attention(
        q, pool, lengths, table, starts, count, sm_scale=SCALE, k_scale=scale, v_scale=scale,
        vmem_limit_bytes=VMEM_BYTES, **sizes,
    )  # fmt: skip


def _paged_case(cache: Cache, format: str) -> TpuCase:
    """JAX's paged attention, which reads a float32 scale beside every int8 number.

    A call uses one core, or divides an even number of key heads or of rows among two.
    """
    from jax.experimental.pallas.ops.tpu.paged_attention import quantization_utils

    pool: Any = shaped(cache.kv_heads, cache.pages, PAGE, HEAD_DIM, dtype=DTYPES[format])
    useful = copied = HEAD_DIM * ELEMENT_BYTES[format]
    if format == "int8":
        scales: Any = shaped(*pool.shape[:3], 1, dtype=jnp.float32)
        pool = quantization_utils.QuantizedTensor(pool, scales)
        copied += HEAD_DIM * SCALE_BYTES
    shapes = (
        shaped(cache.rows, cache.heads, HEAD_DIM),
        pool,
        pool,
        shaped(cache.rows, dtype=jnp.int32),
        cache.table,
    )
    sizes = {"copied": copied, "useful": useful}
    return _of_cache(cache, format, "paged_attention", _paged, shapes, BLOCK * PAGE, **sizes)


def _paged(q, k, v, lengths, table):
    from jax.experimental.pallas.ops.tpu import paged_attention as module

    even = {"kv_head": jax.tree.leaves(k)[0].shape[0], "batch": q.shape[0]}
    modes = [mode for mode, count in even.items() if count % 2 == 0 and num_cores() > 1]
    return module.paged_attention(
        q * SCALE, k, v, lengths, table, pages_per_compute_block=BLOCK,
        megacore_mode=next(iter(modes), None),
    )  # fmt: skip


def _experts() -> Iterator[TpuCase]:
    for format in ELEMENT_BYTES:
        yield _grouped_case(128, format)
        if format == "bf16":
            yield _megablox_case()
    for format in ELEMENT_BYTES:
        yield _grouped_case(8, format)


def _grouped_case(m: int, format: str) -> TpuCase:
    """Scout's experts by blocks of m rows.

    With many rows of each expert, the steady state is within a group, whose tile stays on chip.
    With 8, each block reads a tile, and all rows are on chip.
    """
    n, w = OUTPUTS[m][format], shaped(EXPERTS, D, F)
    if format != "bf16":
        w = jax.eval_shape(functools.partial(quantize_matrix, format=format, group_size=None), w)
    values, *scales = (x.size * x.dtype.itemsize // EXPERTS // F for x in jax.tree.leaves(w))
    sizes: dict[str, Any] = {"copied": n * (values + sum(scales))}
    if m > 8:
        sizes = {"copied": 2 * m * D, "flops": 2 * m * D * n}
    blocks = EXPERTS if m == 8 else TOKENS // m
    shapes = shaped(blocks * m, D), w, shaped(blocks, dtype=jnp.int32)
    function = functools.partial(_grouped, tile_bytes=n * values)
    name, block = f"grouped-{m}-{format}", f"{m} x {D} x {n}"
    return TpuCase(name, OURS, function, shapes, block=block, **sizes)


def _grouped(x, w, group, *, tile_bytes: int):
    config = GroupedTpuConfig(tile_bytes, fp8=mxu_fp8() or GroupedTpuConfig.fp8)
    return grouped_matmul(x, w, group, implementation="mosaic_tpu", config=config)


def _megablox_case() -> TpuCase:
    m, k, n = MEGABLOX
    return TpuCase(
        "grouped-128-bf16",
        "megablox",
        _gmm,
        (shaped(TOKENS, D), shaped(EXPERTS, D, F), shaped(EXPERTS, dtype=jnp.int32)),
        block=f"{m} x {k} x {n}",
        copied=2 * (m * k + k * n),
        flops=2 * m * k * n,
        dearest="end of a sum",
    )


def _gmm(x, w, sizes):
    # The package exports a function of the same name, which hides the module.
    module = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    return module.gmm(x, w, sizes, jnp.bfloat16, MEGABLOX)


def _attention() -> Iterator[TpuCase]:
    """Attention of an attention chunk to itself, for which flash_attention calls JAX's splash."""
    q, key = shaped(1, HEADS, CHUNK, HEAD_DIM), shaped(1, KV_HEADS, CHUNK, HEAD_DIM)
    yield TpuCase(
        "flash-forward",
        "splash_attention",
        _flash,
        (q, key, key, coords(1, CHUNK), coords(1, CHUNK)),
        block=f"{FLASH} x {FLASH}",
        copied=2 * 2 * FLASH * HEAD_DIM,
        flops=2 * 2 * FLASH * FLASH * HEAD_DIM,
    )


def _flash(q, k, v, *coords: Coords):
    return flash_attention(q, k, v, *coords, scale=SCALE, in_order=True)
