"""int4 keys and values on TPUs: two in a row of a page, each of them in the halves of its bytes.

A row has the bytes of keys 2i and 2i + 1 side by side. Queries are multiplied twice, once for each
of the two, beside zeros where the other's bytes are, so that no byte is moved. What belongs to the
first keys of pairs and what to the second are two results, which are joined at the end of a row.

Pages come in twos too, page i of a block with page i + N / 2: a line of t scores has the first keys
of both, or the second.

Shape letters are those of `decode_tpu`; w numbers of a key in a half.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.tpu import SUBLANES, low_halves

PAIR = 2


def rows_of_queries(rows: int) -> int:
    """How many rows the queries of a key head take for keys of one of two places."""
    return -(-rows // SUBLANES) * SUBLANES


def for_each_place(part: Float[Array, "R w"]) -> Float[Array, "two_R two_w"]:
    """A half of the queries twice: where the first keys' numbers are, and where the second's.

    R is rounded up as in `rows_of_queries`.
    """
    rows, width = part.shape
    part = part.astype(jnp.float32)  # whose rows are whole registers
    part = jnp.concatenate([part, jnp.zeros((rows_of_queries(rows) - rows, width))])
    beside = jnp.zeros_like(part)
    first, second = [part, beside], [beside, part]
    return jnp.concatenate([jnp.concatenate(first, 1), jnp.concatenate(second, 1)])


def of_places(result: Float[Array, "two_R n"], rows: int) -> list[Float[Array, "rows n"]]:
    """The results of the first keys of pairs and of the second, without the added rows."""
    half = len(result) // PAIR
    return [result[place * half : place * half + rows] for place in range(PAIR)]


def own_numbers(sums: Float[Array, "two_R two_w"], rows: int) -> list[Float[Array, "rows w"]]:
    """The sums of values for the keys of each place, out of sums of values in pairs."""
    width = sums.shape[1] // PAIR
    return [
        x[:, place * width : (place + 1) * width] for place, x in enumerate(of_places(sums, rows))
    ]


def by_place(x: jax.Array) -> jax.Array:
    """Numbers of keys [N, ..., t] by place in a pair, in the order of lines: [2, N / 2, ..., t]."""
    half, (*outer, tokens) = x.shape[0] // PAIR, x.shape[1:]
    pages, pairs = (each.reshape(-1, tokens) for each in (x[:half], x[half:])), tokens // PAIR
    one, other = (
        [_taken(page, lambda i, place=place: PAIR * (i % pairs) + place) for place in range(PAIR)]
        for page in pages
    )
    of_one = lax.broadcasted_iota(jnp.int32, one[0].shape, 1) < pairs
    lines = jnp.stack([jnp.where(of_one, *each) for each in zip(one, other, strict=True)])
    return lines.reshape(PAIR, half, *outer, tokens)


def in_order_of_places(x: jax.Array) -> jax.Array:
    """Numbers [1, t] of a page's keys: those of the first keys of pairs, then the others."""
    pairs = x.shape[1] // PAIR
    return _taken(x, lambda i: PAIR * (i % pairs) + i // pairs)


def _taken(x: jax.Array, source: Callable) -> jax.Array:
    """x [r, t] with each number i of a row from its place `source(i)`."""
    rows, tokens = x.shape
    if rows == 1:  # the compiler permutes no lone row
        x = jnp.broadcast_to(x, (SUBLANES, tokens))
    index = source(lax.broadcasted_iota(jnp.int32, x.shape, 1))
    return jnp.take_along_axis(x, index, 1, mode="promise_in_bounds")[:rows]


def keys_in_order_of_places(x: Int[Array, "N pairs bytes"], dtype) -> Float[Array, "keys d"]:
    """Keys of pages, in each those that are the first of pairs, then the others."""
    pages, pairs, row = x.shape
    low, high = halves(x.reshape(-1, row), dtype, None)
    width = row // PAIR
    places = (slice(place * width, (place + 1) * width) for place in range(PAIR))
    keys = (jnp.concatenate([low[:, at], high[:, at]], 1) for at in places)
    return jnp.stack([each.reshape(pages, pairs, row) for each in keys], 1).reshape(-1, row)


def halves(x: jax.Array, dtype, fp8) -> Sequence[jax.Array]:
    """The low and the high halves of bytes [r, n] as products take them.

    Args:
        x: int8.
        dtype: the other operand's type.
        fp8: None, or the type in which they are as `low_halves` makes them.
    """
    if fp8 is not None:
        packed = pltpu.bitcast(x, jnp.int32)
        return [low_halves(packed, fp8), low_halves(packed >> 4, fp8)]
    x = x.astype(jnp.int32)
    return [half.astype(jnp.float32).astype(dtype) for half in ((x << 28) >> 28, x >> 4)]
