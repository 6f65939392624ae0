"""Products of a block of rows with a tile of a matrix on TPUs: plain, int8, fp8 or int4.

The MXU widens fp8 while it loads a matrix; int8 is widened before. int4 needs no conversion: half a
byte, increased by 8, is an fp8 number (`low_halves`), and 8 times the sum of a row's inputs is
subtracted from its product.

Shape letters: b rows of a block, D inputs, n outputs of a tile, G scales of an output, c outputs
that are multiplied at a time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantized import INT4_GROUP_SIZE, STORED, QuantizedMatrix
from pallas_kernels.tpu import LANES, dot, increase, low_halves, mxu_fp8, smallest

PAIR = 2 * INT4_GROUP_SIZE  # inputs of two int4 groups, which fill the lanes of a register
FEW_ROWS = 16  # while the MXU loads a matrix it could multiply twice as many rows
INPUTS = 5120  # that are multiplied at a time, at most


def why_not_quantized(
    format: str, group_size: int, inputs: int, groups: int, interpret: Any = None
) -> str | None:
    """Says why the products do not take a quantized matrix; None if they do.

    Args:
        format: of the values.
        group_size: how many inputs of an output share a scale.
        inputs: D.
        groups: how many matrices are stored as one array.
        interpret: parameters of an interpreter, or None.
    """
    if format != "int8" and mxu_fp8() is None:
        return f"of {format} it needs a TPU v5 or later"
    if format == "int4" and group_size != INT4_GROUP_SIZE:
        return f"of int4 it takes one scale for {INT4_GROUP_SIZE} inputs, not {group_size}"
    if format == "int4" and inputs % PAIR and groups > 1 and not interpret:
        return (
            f"of int4 it takes multiples of {PAIR} inputs, not {inputs}: XLA would "
            "transpose the matrices of all groups at every call"
        )
    if group_size % LANES:
        return f"of {format} it takes one scale for a multiple of {LANES} inputs, not {group_size}"
    return None


@dataclasses.dataclass(frozen=True)
class Static:
    """What the products know when they are compiled.

    Attributes:
        outputs_first: whether matrices are [n, D], as quantized ones are, or [D, n].
        columns: c.
        step: inputs that are multiplied at a time. It divides the inputs that share a scale, except
            in int4, of which it is a multiple of `PAIR`.
        fp8: the fp8 type that the MXU takes: float8_e4m3fn, or float8_e4m3b11fnuz, which has the
            same bits for numbers of a 16th, and NaN in place of -0.
    """

    outputs_first: bool
    columns: int
    step: int
    fp8: Any


def static_for(
    matrix: Any, columns: int, *, transposed: bool = False, inputs: int = INPUTS, fp8: Any = None
) -> Static:
    """The `Static` of a matrix, or of several of one kind.

    Args:
        matrix: [..., D, n] or a `QuantizedMatrix`.
        columns: c.
        transposed: whether an array is [..., n, D].
        inputs: how many are multiplied at a time, at most.
        fp8: the name of the fp8 type; None for that of the current device.
    """
    D = matrix.shape[-1 if transposed else -2]
    format = matrix.format if isinstance(matrix, QuantizedMatrix) else None  # arrays have one, too
    if format == "int4":
        step = largest_divisor(max(PAIR, D // PAIR * PAIR), inputs, PAIR)
    else:
        step = largest_divisor(D if format is None else matrix.group_size, inputs, LANES)
    fp8 = jnp.dtype(fp8 or mxu_fp8() or STORED["fp8"])
    return Static(format is not None or transposed, columns, step, fp8)


def largest_divisor(size: int, most: int, unit: int) -> int:
    """The largest multiple of `unit` that divides `size` and is at most `most`."""
    return next(n for n in range(most // unit * unit, 0, -unit) if size % n == 0)


def multiply(static: Static, x, w: Any | QuantizedMatrix, first: int) -> jax.Array:
    """x [b, D] times c outputs of a tile, from `first` on; returns [b, c] float32.

    Args:
        static: sizes and types.
        x: a reference to the rows.
        w: a reference to the tile, or references to its values and scales.
        first: an index of the tile's outputs.
    """
    columns, format = pl.ds(first, static.columns), getattr(w, "format", None)
    add = {None: _add_plain, "int4": _add_int4}.get(format, _add_bytes)
    total = lax.fori_loop(
        0,
        x.shape[1] // static.step,
        lambda index, total: add(static, x, w, columns, index, total),
        jnp.zeros((x.shape[0], static.columns), jnp.float32),
    )
    if format == "int4" and x.shape[1] % PAIR:
        total = _add_last_group(static, x, w, columns, total)
    return total * _factor(static, format)


def _factor(static: Static, format: str | None) -> float:
    """What a value is, over the fp8 number that stands for it."""
    if format not in ("int4", "fp8"):
        return 1.0
    return (1.0 if format == "int4" else smallest(STORED["fp8"])) / smallest(static.fp8)


def _add_plain(static: Static, x, w, columns, index, total):
    inputs = pl.ds(index * static.step, static.step)
    window = (columns, inputs) if static.outputs_first else (inputs, columns)
    return total + dot(x[:, inputs], w[window], transposed=static.outputs_first)


def _add_bytes(static: Static, x, w: QuantizedMatrix, columns, index, total):
    """Adds the product with int8 or fp8 values, times their scale."""
    inputs = pl.ds(index * static.step, static.step)
    steps_a_scale = x.shape[1] // static.step // w.scale.shape[0]
    scale = w.scale[pl.ds(index // steps_a_scale, 1), columns]
    values = w.qvalue[columns, inputs]
    values = values.astype(x.dtype) if w.format == "int8" else _as_fp8(values, static.fp8)
    return total + dot(x[:, inputs], values, transposed=True) * scale


def _as_fp8(values: jax.Array, dtype) -> jax.Array:
    """fp8 values in the type that the MXU takes, of which they may be 16 times the numbers."""
    if values.dtype == dtype:
        return values
    bits = pltpu.bitcast(values, jnp.int8)
    no_sign = jnp.where(bits == -128, jnp.int8(0), bits)  # these bits are -0, and would be NaN
    return pltpu.bitcast(jnp.where(bits & 127 == 127, jnp.int8(-128), no_sign), dtype)


def _add_int4(static: Static, x, w: QuantizedMatrix, columns, index, total):
    """Adds the products with pairs of groups, each times its scales."""
    few, pairs = x.shape[0] <= FEW_ROWS, static.step // PAIR
    for pair in (index * pairs + i for i in range(pairs)):
        packed = pltpu.bitcast(w.qvalue[columns, pl.ds(pair * LANES, LANES)], jnp.int32)
        rows = [x[:, pl.ds(pair * PAIR + i * LANES, LANES)] for i in range(2)]
        products = (_pair_of_few if few else _pair)(rows, packed, static.fp8)
        for i, product in enumerate(products):
            total += product * w.scale[pl.ds(2 * pair + i, 1), columns]
    return total


def _add_last_group(static: Static, x, w: QuantizedMatrix, columns, total):
    """Adds the product with the last of an odd number of groups, of which there are 64 bytes."""
    half = INT4_GROUP_SIZE // 2
    packed = w.qvalue[columns, pl.ds(w.qvalue.shape[1] - half, half)]
    packed = pltpu.bitcast(packed, jnp.int32)
    both = jnp.concatenate([packed, packed >> 4], axis=1)
    rows = x[:, pl.ds(x.shape[1] - INT4_GROUP_SIZE, INT4_GROUP_SIZE)]
    return total + _of_group(rows, both, static.fp8) * w.scale[-1:, columns]


def _of_group(rows, packed, fp8) -> jax.Array:
    """The product with a group, whose values are the low halves of bytes, in their order."""
    return dot(rows, low_halves(packed, fp8), transposed=True) - increase(rows, fp8)


def _pair(rows, packed, fp8) -> list[jax.Array]:
    """Products with two groups, of each of which the halves are brought side by side.

    Args:
        rows: the inputs of each group, [b, 128].
        packed: four outputs' bytes of both groups in each element, [c / 4, 128] int32.
        fp8: the type of the values.
    """
    first, swapped = _first_half(packed), _swap_halves(packed)
    groups = (jnp.where(first, packed, swapped >> 4), jnp.where(first, swapped, packed >> 4))
    return [_of_group(x, w, fp8) for x, w in zip(rows, groups, strict=True)]


def _pair_of_few(rows, packed, fp8) -> list[jax.Array]:
    """`_pair` by two products, with the low and with the high halves of bytes.

    The rows stand there twice, with the inputs of each group where its bytes are, beside zeros.
    """
    x, y = (z.astype(jnp.float32) for z in rows)
    first = _first_half(x)
    low = [jnp.where(first, x, 0), jnp.where(first, 0, _swap_halves(y))]
    high = [jnp.where(first, _swap_halves(x), 0), jnp.where(first, 0, y)]
    low, high = (jnp.concatenate(z).astype(rows[0].dtype) for z in (low, high))
    product = dot(low, low_halves(packed, fp8), transposed=True)
    product += dot(high, low_halves(packed >> 4, fp8), transposed=True)
    return jnp.split(product - jnp.concatenate([increase(z, fp8) for z in rows]), 2)


def _first_half(array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, array.shape, 1) < LANES // 2


def _swap_halves(array) -> jax.Array:
    return pltpu.roll(array, LANES // 2, 1)
