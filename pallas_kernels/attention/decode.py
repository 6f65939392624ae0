"""`decode_attention`: one or a few queries a row against a long cache."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import (
    decode_config,
    decode_mosaic,
    decode_tpu,
    decode_xla,
    flash_xla,
)
from pallas_kernels.attention.checks import (
    check_coords,
    check_ranks,
    check_rule,
    is_floating,
    take_mask,
)
from pallas_kernels.attention.masks import CAUSAL, Coords, Mask, coords_of
from pallas_kernels.choice import Implementation, choose, resolve_config
from pallas_kernels.mosaic import why_not_hopper
from pallas_kernels.quantized import Quantized, row_numbers


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """One call as known at trace time; arguments are explained at `decode_attention`."""

    rows: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: str
    cache: str  # "bfloat16", "float32", ..., or the format of a quantized cache
    page: int | None  # keys a page, with a block table
    scale: float
    mask: Mask = CAUSAL
    return_lse: bool = False
    interpret: Any = None
    paired: bool = False  # whether int4 keys are

    @property
    def row(self) -> int:
        """How many stored numbers the last axis of the cache has."""
        return row_numbers(self.head_dim, self.cache, paired=self.paired)


def _why_not_mosaic(case: DecodeCase) -> str | None:
    columns = case.queries * case.heads // case.kv_heads
    if case.dtype != "bfloat16" or case.cache not in ("bfloat16", *decode_config.STORED):
        return f"it takes bfloat16 queries, not {case.dtype}, and not a cache of {case.cache}"
    if case.head_dim != 128 and (case.head_dim != 64 or case.cache == "int4"):
        return f"it takes head size 128, or 64 without int4, not {case.head_dim}"
    if columns > decode_config.MAX_COLUMNS:
        return (
            f"it takes up to {decode_config.MAX_COLUMNS} queries times heads that share a key "
            f"head, not {columns}"
        )
    if case.page is not None and case.page % decode_config.PAGE_UNIT:
        return f"it takes pages of a multiple of {decode_config.PAGE_UNIT} keys, not {case.page}"
    return why_not_hopper(case.interpret)


# Fastest first.
IMPLEMENTATIONS = (
    Implementation(
        "mosaic_gpu",
        _why_not_mosaic,
        decode_mosaic.decode_mosaic,
        decode_config.DecodeConfig,
        decode_config.config_for,
    ),
    decode_tpu.IMPLEMENTATION,
    Implementation(
        "xla",
        lambda case: None,
        decode_xla.decode_xla,
        flash_xla.FlashXlaConfig,
        decode_xla.config_for,
    ),
)


def decode_attention(
    q: Float[Array, "B H S d"],
    k: Float[Array, "N K T d"] | Quantized,
    v: Float[Array, "N K T d"] | Quantized,
    q_coords: Coords,
    k_coords: Coords | None = None,
    *,
    scale: float,
    causal: bool = True,
    chunk: int | None = None,
    mask: Mask | None = None,
    table: Int[Array, "B pages"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    config: Any = None,
    interpret: Any = None,
) -> Float[Array, "B H S d"] | tuple[Float[Array, "B H S d"], Float[Array, "B H S"]]:
    """`flash_attention` of few queries against a long cache; not differentiable.

    The cache is read once, in blocks, and only those blocks that a row's queries may see.

    Args:
        q: query head `h` reads key/value head `h // (H / K)`.
        k, v: the cache, an array or quantized with a scale a token and head. With a table, a pool
            of pages [pages, K, keys a page, d] that rows share. TPU kernels take int4 `in_pairs`.
        q_coords: positions and segments of the queries.
        k_coords: of the keys [B, T], or of the pool [pages, keys a page]. Default, without a table:
            key t is at position t of segment 1, and causal masking hides what lies beyond the
            queries.
        scale, causal, chunk, mask, return_lse, config, interpret: as for `flash_attention`.
        table: the pages of each row, in order. Entries past a row's end must be pages of
            padding (segment 0).
        implementation: "mosaic_gpu", "mosaic_tpu" or "xla"; None for the fastest that serves the
            call, which `decode_implementation` names.

    Raises:
        ValueError: as `flash_attention`.
    """
    options = {
        "scale": scale, "causal": causal, "chunk": chunk, "mask": mask,
        "return_lse": return_lse, "interpret": interpret,
    }  # fmt: skip
    case = _case(q, k, v, q_coords, k_coords, table, options)
    chosen = choose(IMPLEMENTATIONS, case, implementation)
    config = resolve_config(chosen, case, config)
    if k_coords is None:
        k_coords = coords_of(case.rows, case.keys)
    q_range = case.mask.key_range(q_coords)
    out, lse = chosen.run(q, k, v, q_range, k_coords, table, case, config)
    return (out.astype(jnp.float32), lse) if return_lse else out.astype(q.dtype)


def decode_implementation(
    q, k, v, q_coords=None, k_coords=None, *, table=None, implementation=None, **options
) -> str:
    """The implementation that `decode_attention` picks for such arguments on the current device.

    Args:
        q, k, v, table: arrays or ShapeDtypeStructs; all else as for `decode_attention`.
    """
    options.pop("config", None)
    case = _case(q, k, v, q_coords, k_coords, table, options)
    return choose(IMPLEMENTATIONS, case, implementation).name


def _case(q, k, v, q_coords, k_coords, table, options: dict) -> DecodeCase:
    _check(q, k, v, q_coords, k_coords, table, **options)
    (B, H, S, d), (_, K, page, _) = q.shape, k.shape
    options["mask"] = take_mask(options)
    keys, page = (page, None) if table is None else (page * table.shape[1], page)
    cache = k.format if isinstance(k, Quantized) else jnp.dtype(k.dtype).name
    options["paired"] = isinstance(k, Quantized) and k.paired
    return DecodeCase(B, H, K, S, keys, d, jnp.dtype(q.dtype).name, cache, page, **options)


def _check(q, k, v, q_coords, k_coords, table, *, scale, chunk=None, mask=None, **_) -> None:
    check_ranks(q, k, v)
    (B, H, S, d), (pages, K, length, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape[3] != d or (table is None and pages != B):
        kind = "[rows, key heads, keys, head size]" if table is None else "pages of one shape"
        raise ValueError(
            f"k {k.shape} and v {v.shape} must both be {kind} with the {B} rows and the head size "
            f"{d} of q {q.shape}."
        )
    formats = [x.format if isinstance(x, Quantized) else x.dtype for x in (k, v)]
    plain = not isinstance(k, Quantized)
    if formats[0] != formats[1] or not is_floating(q) or (plain and not is_floating(k)):
        raise ValueError(
            f"k, v are {formats[0]}, {formats[1]} and q is {q.dtype}; use one format for the "
            "cache, floating or Quantized, and a floating type for the queries."
        )
    check_rule(H, K, scale, chunk, mask)
    if table is not None and (table.ndim != 2 or table.shape[0] != B):
        raise ValueError(f"table has shape {table.shape}; it must be ({B}, pages of a row).")
    if table is not None and k_coords is None:
        raise ValueError("with a table, k_coords of the pool's pages are needed.")
    check_coords(q_coords=(q_coords, B, S), k_coords=(k_coords, pages, length))
