"""Who sees whom: the attention rule, from the positions and segments of tokens, never from slots.

Shape letters: B rows, S queries, T keys; q and t are blocks of queries and of keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

_LOWEST, _HIGHEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


class Coords(NamedTuple):
    """Where tokens are. A token of segment 0 is padding: it sees nothing and nothing sees it."""

    position: Int[Array, "batch length"]
    segment: Int[Array, "batch length"]


class Reach(NamedTuple):
    """What each query sees: the keys of its segment at positions `first` to `last`, inclusive."""

    first: Int[Array, "batch length"]
    last: Int[Array, "batch length"]
    segment: Int[Array, "batch length"]


class Ranges(NamedTuple):
    """Of each block on one side, the blocks of the other side that it meets, `start` to `stop`.

    Those from `full_start` to `full_stop` need no mask; the others of the range may.
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


def reach(q: Coords, *, causal: bool, chunk: int | None) -> Reach:
    """Not later if `causal`, and the same chunk `position // chunk` if any."""
    first = jnp.full_like(q.position, _LOWEST)
    end = jnp.full_like(q.position, _HIGHEST)
    if chunk is not None:
        first = q.position // chunk * chunk
        end = first + (chunk - 1)
    return Reach(first, q.position if causal else end, q.segment)


def visible(q: Reach, k: Coords) -> Bool[Array, "B S T"]:
    """Whether each query sees each key."""
    first, last, segment = (x[:, :, None] for x in q)
    position, k_segment = (x[:, None, :] for x in k)
    return (position >= first) & (position <= last) & (k_segment == segment) & (k_segment != 0)


def pad_tokens(tokens, block: int):
    """Coords or Reach rounded up to a multiple of `block` with padding tokens."""
    extra = -tokens.segment.shape[1] % block
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, extra))), tokens) if extra else tokens


class Extents(NamedTuple):
    """What there is in each block of keys: of real tokens, positions and segments, both inclusive.

    A block without any has the lowest as its last and the highest as its first.
    """

    first: Int[Array, "batch blocks"]
    last: Int[Array, "batch blocks"]
    low: Int[Array, "batch blocks"]
    high: Int[Array, "batch blocks"]
    whole: Bool[Array, "batch blocks"]  # no token is padding


NOTHING = (_HIGHEST, _LOWEST, _HIGHEST, _LOWEST, False)  # Extents of a block of padding


def extents(k: Coords, block: int) -> Extents:
    """Of blocks of keys, which divide the length."""
    real = k.segment.reshape(k.segment.shape[0], -1, block) != 0
    return Extents(*_extremes(k.position, real), *_extremes(k.segment, real), jnp.all(real, -1))


def meets(
    q: Reach, k: Extents, block_q: int
) -> tuple[Bool[Array, "B Nq Nk"], Bool[Array, "B Nq Nk"]]:
    """Of each pair of blocks: whether some query may see some key, and whether all see all.

    The first is never false when one can. The second leaves out queries that are padding, whose
    results need no mask because they are discarded.
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


def ranges(some: Bool[Array, "B N M"], every: Bool[Array, "B N M"]) -> Ranges:
    """What each of N blocks meets of the M, from `meets` (transposed for keys that meet queries).

    Blocks that need no mask are used as such only where they lie in one run.
    """
    start, stop = _span(some)
    full_start, full_stop = _span(every)
    one_run = (full_stop - full_start == jnp.sum(every, -1)) & (full_stop > full_start)
    return Ranges(
        start, jnp.where(one_run, full_start, start), jnp.where(one_run, full_stop, start), stop
    )


def _span(hit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and one past the last true index along the last axis; (0, 0) if there is none."""
    index = jnp.arange(hit.shape[-1], dtype=jnp.int32)
    stop = jnp.max(jnp.where(hit, index + 1, 0), -1)
    return jnp.min(jnp.where(hit, index, stop[..., None]), -1), stop
