"""Which keys a query sees, from the positions and segments of tokens, never from their slots.

A `Mask` says it by position; `Mask.key_range` makes of it a range of keys for each query, which is
all that kernels compare.

Shape letters: B rows, S queries, T keys; q and t are blocks of queries and of keys.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

_LOWEST, _HIGHEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


class Coords(NamedTuple):
    """Where tokens are. A token of segment 0 is padding: it sees nothing and nothing sees it."""

    position: Int[Array, "batch length"]
    segment: Int[Array, "batch length"]


class KeyRange(NamedTuple):
    """What each query sees: the keys of its segment at positions `first` to `last`, inclusive.

    `first` is not after `last`.
    """

    first: Int[Array, "batch length"]
    last: Int[Array, "batch length"]
    segment: Int[Array, "batch length"]


class BlockRanges(NamedTuple):
    """For each block on one side, the blocks of the other side to visit: `start` up to `stop`.

    Those from `full_start` up to `full_stop` need no mask; the others of the range may.
    """

    start: Int[Array, "batch blocks"]
    full_start: Int[Array, "batch blocks"]
    full_stop: Int[Array, "batch blocks"]
    stop: Int[Array, "batch blocks"]


def coords_of(
    rows: int,
    length: int,
    *,
    start: int | Int[Array, "rows"] = 0,
    lengths: Int[Array, "rows"] | None = None,
) -> Coords:
    """Rows that each hold one sequence in order.

    Args:
        start: the position of the first token, one for all rows or one a row.
        lengths: how many tokens of each row are real; default: all.
    """
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    first = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (rows,))[:, None]
    real = jnp.ones_like(index) if lengths is None else (index < lengths[:, None]).astype(jnp.int32)
    return Coords(index + first, real)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys of its own segment a query sees, by position: here all, or all up to itself.

    A subclass narrows this, and may be written outside the library: every implementation takes any
    mask, or says why it does not. A mask must be hashable, because programs are compiled for it.

    Attributes:
        causal: a query does not see later positions than its own.
    """

    causal: bool = True

    @property
    def span(self) -> int | None:
        """How many positions a query sees at most, its own included; None if there is no bound."""
        return None

    @property
    def block_diagonal(self) -> bool:
        """Whether tokens of a segment see each other exactly if their `first` is equal.

        That leaves aside later tokens, if causal. It is true of chunks, and not of sliding windows.
        """
        return True

    def first(self, position: Any) -> Any:
        """The first position that a query sees; it does not fall as positions grow.

        Args:
            position: of the query, an array of JAX or NumPy or a number.
        """
        return jnp.full_like(position, _LOWEST)

    def last(self, position: Any) -> Any:
        """The last position that a query sees; its own, if the mask is causal."""
        return position if self.causal else jnp.full_like(position, _HIGHEST)

    def key_range(self, q: Coords) -> KeyRange:
        """What each query sees, as kernels read it."""
        return KeyRange(self.first(q.position), self.last(q.position), q.segment)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkedMask(Mask):
    """A query sees positions of its own chunk, `position // chunk`, only.

    Attributes:
        chunk: positions of a chunk, 1 or more.
    """

    chunk: int

    @property
    def span(self) -> int:
        """A chunk."""
        return self.chunk

    def first(self, position: Any) -> Any:
        """The first position of the query's chunk."""
        return position // self.chunk * self.chunk

    def last(self, position: Any) -> Any:
        """The query's own position, or the last one of its chunk."""
        return position if self.causal else self.first(position) + (self.chunk - 1)


CAUSAL = Mask()


def make_mask(causal: bool = True, chunk: int | None = None) -> Mask:
    """The mask that the arguments `causal` and `chunk` of attention functions mean."""
    return Mask(causal=causal) if chunk is None else ChunkedMask(causal=causal, chunk=chunk)


def visible(q: KeyRange, k: Coords) -> Bool[Array, "B S T"]:
    """Whether each query sees each key."""
    first, last, segment = (x[:, :, None] for x in q)
    position, k_segment = (x[:, None, :] for x in k)
    return (position >= first) & (position <= last) & (k_segment == segment) & (k_segment != 0)


def pad_tokens(tokens, block: int):
    """A Coords or KeyRange rounded up to a multiple of `block` with padding tokens."""
    extra = -tokens.segment.shape[1] % block
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, extra))), tokens) if extra else tokens


class Extents(NamedTuple):
    """The least and greatest position and segment of the real tokens in each block of keys.

    In a block of padding the least is the largest int32 and the greatest the smallest.
    """

    first: Int[Array, "batch blocks"]
    last: Int[Array, "batch blocks"]
    low: Int[Array, "batch blocks"]
    high: Int[Array, "batch blocks"]
    whole: Bool[Array, "batch blocks"]  # no token is padding


NOTHING = (_HIGHEST, _LOWEST, _HIGHEST, _LOWEST, False)  # Extents of a block of padding


def extents(k: Coords, block: int) -> Extents:
    """The `Extents` of keys cut into blocks of `block` tokens, which divides their number."""
    real = k.segment.reshape(k.segment.shape[0], -1, block) != 0
    return Extents(*_extremes(k.position, real), *_extremes(k.segment, real), jnp.all(real, -1))


def joined_extents(k: Extents, count: int) -> Extents:
    """The extents of groups of `count` blocks, which divides the number of blocks."""
    first, last, low, high, whole = (x.reshape(len(x), -1, count) for x in k)
    return Extents(first.min(-1), last.max(-1), low.min(-1), high.max(-1), whole.all(-1))


def visible_blocks(
    q: KeyRange, k: Extents, block_q: int
) -> tuple[Bool[Array, "B Nq Nk"], Bool[Array, "B Nq Nk"]]:
    """(any_visible, all_visible) of each pair of a block of queries and one of keys.

    The first is true wherever some query sees some key, and may be where none does. The second
    leaves out queries that are padding, whose results need no mask because they are discarded.
    """
    q_real = q.segment.reshape(q.segment.shape[0], -1, block_q) != 0
    (first_low, first_high), (last_low, last_high), (q_low, q_high) = (
        [x[:, :, None] for x in _extremes(x, q_real)] for x in q
    )
    k_first, k_last, k_low, k_high, whole = (x[:, None] for x in k)
    some = (k_first <= last_high) & (k_last >= first_low) & (k_low <= q_high) & (k_high >= q_low)
    every = (k_first >= first_high) & (k_last <= last_low)
    one_segment = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    return some, some & every & one_segment & whole


def _extremes(x: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest value of each block's real tokens."""
    x = x.reshape(real.shape)
    low = jnp.min(jnp.where(real, x, _HIGHEST), -1)
    return low, jnp.max(jnp.where(real, x, _LOWEST), -1)


def block_ranges(some: Bool[Array, "B N M"], every: Bool[Array, "B N M"]) -> BlockRanges:
    """For each of N blocks, which of the M blocks to visit, from `visible_blocks` or its transpose.

    Blocks that need no mask are used as such only where they lie in one run.
    """
    start, stop = _span(some)
    full_start, full_stop = _span(every)
    one_run = (full_stop - full_start == jnp.sum(every, -1)) & (full_stop > full_start)
    return BlockRanges(
        start, jnp.where(one_run, full_start, start), jnp.where(one_run, full_stop, start), stop
    )


def _span(hit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and one past the last true index along the last axis; (0, 0) if there is none."""
    index = jnp.arange(hit.shape[-1], dtype=jnp.int32)
    stop = jnp.max(jnp.where(hit, index + 1, 0), -1)
    return jnp.min(jnp.where(hit, index, stop[..., None]), -1), stop
