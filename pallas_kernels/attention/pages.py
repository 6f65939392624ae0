"""A cache in pages: a pool that rows share, and for each row a table of its pages in order.

Shape letters: B rows, P pages of the pool, K key/value heads, t keys a page, n pages of a row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.masks import NOTHING, Coords, Extents
from pallas_kernels.quantized import unpaired


def extents_of_rows(
    pool: Extents, table: Int[Array, "B n"], real: Bool[Array, "n"] | None = None
) -> Extents:
    """The extents of each row's blocks in order, [B, n * blocks a page], from those of a pool's.

    Args:
        real: which columns of the table count.
    """
    extent = Extents(*(x[table] for x in pool))
    if real is not None:
        extent = Extents(
            *(jnp.where(real[:, None], x, y) for x, y in zip(extent, NOTHING, strict=True))
        )
    return Extents(*(x.reshape(len(table), -1) for x in extent))


def of_owners(by_page: Extents, owner: Int[Array, "B n"]) -> Extents:
    """The extents of pages [B, n] whose tokens have one segment, 0 for none."""
    first, last, _, _, whole = by_page
    real = (first <= last) & (owner != 0)
    extent = zip((first, last, owner, owner, whole), NOTHING, strict=True)
    return Extents(*(jnp.where(real, x, nothing) for x, nothing in extent))


def rows_of_pages(
    k, v, coords: Coords, table: Int[Array, "B n"], real: Bool[Array, "*B n"] | None = None
):
    """Keys and values [B, K, n * t, ...] and their Coords [B, n * t], copied out of a pool.

    Values of padding are zeros.

    Args:
        k, v: arrays [P, K, t, d] or `Quantized`.
        coords: of the pool, [P, t].
        real: which columns or entries of the table count: the others are padding.
    """

    def gather(leaf):
        pages = jnp.moveaxis(leaf[table], 1, 2)
        return pages.reshape(*pages.shape[:2], -1, *pages.shape[4:])

    position, segment = (x[table] for x in coords)
    if real is not None:
        segment = jnp.where(real[..., None], segment, 0)
    flat = Coords(*(x.reshape(len(table), -1) for x in (position, segment)))

    k, v = (unpaired(jax.tree.map(gather, x)) for x in (k, v))
    return k, without_padding(v, flat), flat


def without_padding(v, coords: Coords):
    """Values [B, K, T, d], an array or `Quantized`, with zeros for padding.

    A probability of 0 does not remove NaN, such as another row may have left in a page.
    """

    def zero_padding(leaf):
        real = (coords.segment != 0).reshape(len(leaf), 1, -1, *[1] * (leaf.ndim - 3))
        return jnp.where(real, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(zero_padding, v)


def keep_apart(
    k: Float[Array, "B K T d"], v: Float[Array, "B K T d"]
) -> tuple[Float[Array, "B K T d"], Float[Array, "B K T d"]]:
    """Keys and values such that a sequence's NaN do not reach other sequences of its block.

    A weight of 0 does not remove a NaN or infinite value, but a score that is masked is not used.
    """
    bad = ~jnp.isfinite(v).all(axis=-1, keepdims=True)
    return jnp.where(bad, jnp.nan, k), jnp.where(bad, 0, v)
