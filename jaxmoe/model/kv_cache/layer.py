"""Keys and values of one layer in pages: to make, to write and to attend to.

Shape letters: B rows, H query heads, K key/value heads, P pages, t tokens a page, d head size,
S new tokens a row, n pages of a row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.errors import UserError
from jaxmoe.model.kernels import AttentionOptions
from jaxmoe.model.packing import PackedRows
from pallas_kernels.attention import Coords, decode_attention, paged_attention
from pallas_kernels.quantized import LARGEST, Quantized, in_pairs, quantize

KV_FORMATS = ("bf16", *LARGEST)  # of keys and values, by name
FLOATS = ("bf16", "bfloat16", "float32", "float16")
FEW_QUERIES = 4  # up to so many a row, pages are read at memory speed rather than in tiles


class PieceTable(NamedTuple):
    """The pages of the rows that have a piece of a packed step, row by row, then null pages.

    Attributes:
        page: its index among a device's pages.
        segment: that of the piece's tokens, 0 for a null page.
    """

    page: Int[Array, "shards G M"]
    segment: Int[Array, "shards G M"]


class LayerCache(NamedTuple):
    """Keys and values of one layer, [P, K, t, d]: arrays, or quantized with a scale a token.

    int4 lies in pairs of tokens, see `Quantized`.
    """

    k: Float[Array, "P K t d"] | Quantized
    v: Float[Array, "P K t d"] | Quantized

    def write(
        self, k: Float[Array, "B K S d"], v: Float[Array, "B K S d"], index: Int[Array, "B S"]
    ) -> "LayerCache":
        """The cache with new keys and values at `index`, which counts the slots of all pages."""
        return LayerCache(write(self.k, k, index), write(self.v, v, index))


def empty_layer(shape: tuple[int, ...], dtype: Any) -> LayerCache:
    """Zeros of a shape [P, K, t, d].

    Args:
        dtype: a dtype, or one of KV_FORMATS.

    Raises:
        UserError: for a format that is unknown.
    """
    return LayerCache(_zeros(shape, dtype), _zeros(shape, dtype))


def _zeros(shape: tuple[int, ...], dtype: Any):
    if isinstance(dtype, str) and dtype in LARGEST:
        stored = jax.eval_shape(
            lambda x: in_pairs(quantize(x, dtype)), jax.ShapeDtypeStruct(shape, "float32")
        )
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stored)
    if isinstance(dtype, str) and dtype not in FLOATS:
        raise UserError(f"cache format '{dtype}' is unknown; there are {', '.join(KV_FORMATS)}.")
    return jnp.zeros(shape, jnp.bfloat16 if dtype == "bf16" else dtype)


def write(keys, new: Float[Array, "B K S d"], index: Int[Array, "B S"]):
    """Pages of keys or values with new ones written, quantized if the pages are.

    Args:
        keys: an array [P, K, t, d] or `Quantized`.
        index: the slot of each new token, counted over all pages; beyond them for none.
    """
    stored = quantize(new, keys.format) if isinstance(keys, Quantized) else new

    return jax.tree.map(functools.partial(_put, index[..., None]), keys, stored)


def _put(index: Int[Array, "B S 1"], leaf, x):
    """Pages [P, K, t, ...] with new tokens' x [B, K, S, ...], or pages with several tokens a row.

    Heads are indexed too: for a slice of them, XLA would transpose the pool on TPUs.
    """
    x = jnp.swapaxes(x, 1, 2).astype(leaf.dtype)
    pages, heads, rows = leaf.shape[0], jnp.arange(leaf.shape[1]), leaf.shape[2]
    together = leaf.shape[3] // x.shape[3] if leaf.ndim > 3 else 1
    row, place = index // together, index % together
    if together == 1:
        return leaf.at[row // rows, heads, row % rows].set(x, mode="drop")
    x = jnp.concatenate([x] * together, -1)
    place_of_number = jnp.arange(leaf.shape[3]) // (leaf.shape[3] // together)
    for each in range(together):  # of one place, no two tokens share a row
        at = jnp.where(place == each, row // rows, pages), heads, row % rows
        old = leaf.at[at].get(mode="fill", fill_value=0)
        leaf = leaf.at[at].set(jnp.where(place_of_number == each, x, old), mode="drop")
    return leaf


def attend_rows(
    options: AttentionOptions,
    q: Float[Array, "B H S d"],
    cache: LayerCache,
    coords: Coords,
    page_coords: Coords,
    table: Int[Array, "B n"],
) -> tuple[Float[Array, "B H S d"], Float[Array, "B H S"]]:
    """Attention of each row's tokens to its pages; output and log-sum-exp, both float32."""
    where, shared = (coords, page_coords), options._asdict()
    if q.shape[2] > FEW_QUERIES:
        return paged_attention(q, *cache, *where, table, **shared)
    out, lse = decode_attention(q, *cache, *where, table=table, return_lse=True, **shared)
    return out, lse


def attend_single(
    options: AttentionOptions,
    q: Float[Array, "1 H T d"],
    cache: LayerCache,
    coords: Coords,
    page_coords: Coords,
    rows: PackedRows,
    table: Int[Array, "R n"],
) -> tuple[Float[Array, "1 H D d"], Float[Array, "1 H D"]]:
    """Attention of the first tokens of a packed step, where they are single, to their rows' pages.

    Args:
        table: the pages of all rows, R, which bounds how many single tokens there are.
    """
    count = min(len(table), q.shape[2])
    row, where = rows.first(count, coords)
    out, lse = decode_attention(
        jnp.swapaxes(q[0, :, :count], 0, 1)[:, :, None],
        *cache,
        where,
        page_coords,
        table=table[row],
        return_lse=True,
        **options._asdict(),
    )
    return jnp.swapaxes(out[:, :, 0], 0, 1)[None], jnp.swapaxes(lse[:, :, 0], 0, 1)[None]


def attend_pieces(
    options: AttentionOptions,
    q: Float[Array, "1 H T d"],
    cache: LayerCache,
    coords: Coords,
    page_coords: Coords,
    pieces: PieceTable | None,
) -> tuple[Float[Array, "1 H T d"], Float[Array, "1 H T"]]:
    """Attention of the pieces of prompts in a packed step to their rows' pages."""
    assert pieces is not None
    out, lse = paged_attention(
        q, *cache, coords, page_coords, *(x[0] for x in pieces), **options._asdict()
    )
    return out, lse
