"""Symmetric quantization to int8, fp8 (e4m3) and int4, with float32 scales.

`Quantized` has a scale for each vector of the last axis, and stores the KV cache. `QuantizedMatrix`
has a scale for each group of inputs of an output, and stores weights.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The largest magnitude that each format stores: the scale maps a vector's largest element to it.
LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}
INT4_GROUP_SIZE = 128  # inputs that share a scale in int4 matrices, unless it does not divide them
ROW = 128  # bytes
STORED = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "int4": jnp.int8}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["qvalue", "scale"], meta_fields=["format"]
)
@typing.no_type_check  # JAX rebuilds pytrees with shapes or shardings in place of arrays
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An array [..., d] stored as `qvalue * scale`. The field names are those of qwix.

    Attributes:
        qvalue: [..., d] int8 or float8_e4m3fn; for int4 [..., d / 2] int8, where byte i holds
            element i in its low and element i + d / 2 in its high four bits. Of int4 in pairs,
            [..., n / 2, d], a row holds two of the n vectors [..., n, d], one after the other.
        scale: [...] float32, one for each vector of the last axis.
        format: "int8", "fp8" (e4m3) or "int4".
    """

    qvalue: jax.Array
    scale: jax.Array
    format: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape [..., d] of the dequantized array."""
        row = self.qvalue.shape[-1] // (2 if self.paired else 1)
        return (*self.scale.shape, 2 * row if self.format == "int4" else row)

    @property
    def paired(self) -> bool:
        """Whether a row of `qvalue` holds two vectors."""
        return self.qvalue.shape[:-1] != self.scale.shape


def quantize(x: Float[Array, "... d"], format: str) -> Quantized:
    """Quantizes each vector of the last axis to the nearest values of the format.

    The scale is the vector's largest magnitude over the format's largest (absmax quantization).

    Args:
        x: the vectors.
        format: "int8", "fp8" or "int4".

    Raises:
        ValueError: for an unknown format, or an odd d with int4.
    """
    if format not in LARGEST:
        raise ValueError(f"format '{format}' is unknown; there are {', '.join(LARGEST)}.")
    if format == "int4" and x.shape[-1] % 2:
        raise ValueError(f"int4 stores two elements a byte, and the last axis has {x.shape[-1]}.")
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / LARGEST[format]
    scaled = x / jnp.where(scale == 0, 1, scale)[..., None]
    if format != "fp8":
        scaled = jnp.round(scaled)
    stored = scaled.astype(STORED[format])
    return Quantized(_pack(stored) if format == "int4" else stored, scale, format)


def in_pairs(x: Quantized) -> Quantized:
    """`x` with its vectors in pairs where these are rows of up to ROW bytes, else as it is.

    The bytes keep their order. Rows of ROW bytes fill a vector of a TPU; XLA stores an array with
    shorter ones transposed there, and copies it before each kernel.
    """
    *outer, count, width = x.qvalue.shape
    if x.format != "int4" or x.paired or count % 2 or 2 * width > ROW:
        return x
    return dataclasses.replace(x, qvalue=x.qvalue.reshape(*outer, count // 2, 2 * width))


def row_numbers(d: int, cache: str, *, paired: bool) -> int:
    """How many numbers a row of keys of size d has as stored in a format or type."""
    return d * (2 if paired else 1) // (2 if cache == "int4" else 1)


def unpaired(x):
    """`x` with a row for each vector; arrays that are not `Quantized` are returned as they are."""
    if not isinstance(x, Quantized) or not x.paired:
        return x
    return dataclasses.replace(x, qvalue=x.qvalue.reshape(*x.scale.shape, -1))


def dequantize(x: Quantized, dtype=jnp.float32) -> jax.Array:
    """The array [..., d] that `x` stores, qvalue * scale, in the given dtype."""
    x = unpaired(x)
    values = unpack(x.qvalue) if x.format == "int4" else x.qvalue
    return (values.astype(jnp.float32) * x.scale[..., None]).astype(dtype)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["qvalue", "scale"], meta_fields=["format"]
)
@typing.no_type_check  # for the reason given at `Quantized`
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """Matrices [..., in, out] in which each group of `group_size` inputs of an output has a scale.

    Values are stored [out, in], because tensor cores require the summed axis of 8-bit operands to
    be contiguous. Scales are stored [groups, out], so that the scales of a tile are contiguous.

    Attributes:
        qvalue: [..., out, in]; for int4 [..., out, in / 2], where each group of inputs is packed
            like a vector of `Quantized`.
        scale: [..., in / group_size, out] float32.
        format: "int8", "fp8" (e4m3) or "int4".
    """

    qvalue: jax.Array
    scale: jax.Array
    format: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape [..., in, out] of the dequantized matrices."""
        *outer, out, stored = self.qvalue.shape
        return (*outer, 2 * stored if self.format == "int4" else stored, out)

    @property
    def group_size(self) -> int:
        """How many inputs of an output share a scale."""
        return self.shape[-2] // self.scale.shape[-2]


def default_group_size(format: str, inputs: int) -> int:
    """How many inputs of an output share a scale, unless `quantize_matrix` is told otherwise.

    All of them for 8-bit formats. For int4, which is too coarse for one scale, 128, the size that
    the kernels serve, or else the largest smaller even number that divides the inputs.
    """
    if format != "int4":
        return inputs
    return next((size for size in range(INT4_GROUP_SIZE, 0, -2) if inputs % size == 0), inputs)


def quantize_matrix(
    w: Float[Array, "*outer inputs outputs"], format: str, group_size: int | None = None
) -> QuantizedMatrix:
    """Quantizes each group of inputs of an output of matrices, as `quantize` does a vector.

    Args:
        w: the matrices.
        format: "int8", "fp8" or "int4".
        group_size: how many inputs of an output share a scale; None for `default_group_size`.

    Raises:
        ValueError: for an unknown format, an odd group_size with int4, or a group_size that does
            not divide the inputs.
    """
    *outer, inputs, outputs = w.shape
    size = group_size or default_group_size(format, inputs)
    if inputs % size:
        raise ValueError(f"{inputs} inputs are no multiple of the {size} that share a scale.")
    vectors = jnp.swapaxes(w, -1, -2).reshape(*outer, outputs, inputs // size, size)
    stored = quantize(vectors, format)
    qvalue = stored.qvalue.reshape(*outer, outputs, -1)
    return QuantizedMatrix(qvalue, jnp.swapaxes(stored.scale, -1, -2), format)


def dequantize_matrix(w: QuantizedMatrix, dtype=jnp.float32) -> jax.Array:
    """The matrices [..., in, out] that `w` stores, in the given dtype."""
    *outer, groups, outputs = w.scale.shape
    vectors = w.qvalue.reshape(*outer, outputs, groups, -1)
    by_output = dequantize(Quantized(vectors, jnp.swapaxes(w.scale, -1, -2), w.format), dtype)
    return jnp.swapaxes(by_output.reshape(*outer, outputs, -1), -1, -2)


def _pack(x: jax.Array) -> jax.Array:
    low, high = jnp.split(x, 2, axis=-1)
    return (low & 0xF) | (high << 4)


def unpack(x: jax.Array) -> jax.Array:
    """The int4 elements [..., d] of packed bytes [..., d / 2], sign-extended to int8."""
    return jnp.concatenate([(x << 4) >> 4, x >> 4], axis=-1)
