"""Steps whose rows are not those of the cache: only rows with new tokens take part, side by side.

A batch has rows that read their prompts, rows that write one token a step, and rows without work.
Padding them all to one width would compute many tokens in vain. Here a step has as many tokens as
there are, in one of two layouts:

- Lines [D, S] of up to S tokens of one row, filled up with padding; a row may have several lines,
  one after the other. With S = 1 they are single tokens. Attention reads the row's keys once for
  all tokens of a line. The new tokens of a row lie in one chunk of chunked layers.
- Packed tokens [G, T], one line a group of the cache's rows (see `kv_cache.row_groups`): first
  single tokens of some rows, then pieces of prompts, one after the other, each of another row.

Every row holds one sequence, so that its tokens lie in the order of their positions.

Shape letters: B lines, S tokens a line, G groups, N pieces a group, R rows of a group.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.attention import Coords


class Packing(NamedTuple):
    """Which row of the cache each new token belongs to.

    Attributes:
        row: of its group; of padding any.
        single: whether a token is a single one; None in lines.
        pieces: the rows that have a piece, each of whose tokens has the piece's place in this list,
            counted from 1, as its segment; -1 for none. None in lines.
    """

    row: Int[Array, "B S"]
    single: Bool[Array, "B S"] | None = None
    pieces: Int[Array, "G N"] | None = None


class PackedRows(NamedTuple):
    """The rows of packed tokens, and which tokens are single: see `Packing`."""

    row: Int[Array, "G T"]
    single: Bool[Array, "G T"]

    def first(self, count: int, coords: Coords) -> tuple[Int[Array, "count"], Coords]:
        """Row and coordinates [count, 1] of the first tokens of one group; others are padding."""
        position, segment = (x[0, :count, None] for x in coords)
        single = self.single[0, :count, None] & (segment != 0)
        return self.row[0, :count], Coords(position, single.astype(jnp.int32))

    def pieces(self, coords: Coords) -> Coords:
        """The coordinates with single tokens as padding."""
        return coords._replace(segment=jnp.where(self.single, 0, coords.segment))


def stored(coords: Coords) -> Coords:
    """What a row's pages say of its tokens, whichever rows come to share them."""
    return coords._replace(segment=jnp.minimum(coords.segment, 1))


def last_of_rows(coords: Coords, row: Int[Array, "B S"], rows: int) -> Coords:
    """The coordinates of the last new token of each token's row."""
    position = jnp.where(coords.segment != 0, coords.position, -1)
    last = jnp.full(rows, -1, jnp.int32).at[row].max(position, mode="drop")
    return Coords(last[row], coords.segment)


def last_of_lines(coords: Coords) -> Coords:
    """The coordinates [B, 1] of the last real token of each line."""
    real = coords.segment != 0
    index = jnp.arange(real.shape[1])
    last = jnp.max(jnp.where(real, index, 0), axis=1, keepdims=True)
    return Coords(*(jnp.take_along_axis(x, last, axis=1) for x in coords))


def merge_single(
    packed: PackedRows, single: jax.Array, of_pieces: jax.Array, axis: int
) -> jax.Array:
    """Results for single tokens, the first along an axis, and for pieces, put together.

    Args:
        single: of the first tokens.
        of_pieces: of all tokens of one group, [1, ..., T, ...].
    """
    extra = of_pieces.shape[axis] - single.shape[axis]
    widths = [(0, extra if i == axis else 0) for i in range(single.ndim)]
    chosen = packed.single.reshape([-1 if i == axis else 1 for i in range(single.ndim)])
    return jnp.where(chosen, jnp.pad(single, widths), of_pieces)
