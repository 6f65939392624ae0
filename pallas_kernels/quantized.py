"""Arrays stored in 8 or 4 bits: vectors with a scale each, and matrices laid out for kernels."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Largest magnitude of each format: a vector's largest element is stored as this.
LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}
INT4_WIDTH = 128  # inputs of a matrix that share a scale
STORED = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "int4": jnp.int8}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["qvalue", "scale"], meta_fields=["format"]
)
@typing.no_type_check  # JAX rebuilds it with shapes or shardings for arrays
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An array as `qvalue * scale`. Field names are those of qwix.

    Attributes:
        qvalue: [..., d] int8 or float8_e4m3fn; for int4 [..., d / 2] int8, where byte i holds
            element i in its low and element i + d / 2 in its high half.
        scale: [...] float32.
        format: "int8", "fp8" (e4m3) or "int4".
    """

    qvalue: jax.Array
    scale: jax.Array
    format: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that this stands for."""
        *outer, stored = self.qvalue.shape
        return (*outer, 2 * stored if self.format == "int4" else stored)


def quantize(x: Float[Array, "... d"], format: str) -> Quantized:
    """Rounds to the nearest value of the format, symmetrically about zero.

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


def dequantize(x: Quantized, dtype=jnp.float32) -> jax.Array:
    """The array that `x` stands for."""
    values = unpack(x.qvalue) if x.format == "int4" else x.qvalue
    return (values.astype(jnp.float32) * x.scale[..., None]).astype(dtype)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["qvalue", "scale"], meta_fields=["format"]
)
@typing.no_type_check  # as above
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """Matrices [..., in, out], of which `width` inputs of an output share a scale.

    Stored by output, so that what a product sums over is contiguous: tensor cores take 8-bit
    operands in no other way. Scales are stored by input, so that a tile's are contiguous.

    Attributes:
        qvalue: [..., out, in]; for int4 [..., out, in / 2], each `width` inputs packed as a vector
            of `Quantized`.
        scale: [..., in / width, out] float32.
        format: as of `Quantized`.
    """

    qvalue: jax.Array
    scale: jax.Array
    format: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices that this stands for."""
        *outer, out, stored = self.qvalue.shape
        return (*outer, 2 * stored if self.format == "int4" else stored, out)

    @property
    def width(self) -> int:
        """How many inputs share a scale."""
        return self.shape[-2] // self.scale.shape[-2]


def scale_width(format: str, inputs: int) -> int:
    """How many inputs of a matrix share a scale: 4 bits are too few for a whole column.

    Of int4 128, which kernels take, or the largest even number below that divides the inputs.
    """
    if format != "int4":
        return inputs
    return next((width for width in range(INT4_WIDTH, 0, -2) if inputs % width == 0), inputs)


def quantize_matrix(
    w: Float[Array, "*outer inputs outputs"], format: str, width: int | None = None
) -> QuantizedMatrix:
    """Rounds matrices as `quantize` does vectors.

    Args:
        width: how many inputs of an output share a scale; None for `scale_width`.

    Raises:
        ValueError: as `quantize`; or if the width does not divide the inputs.
    """
    *outer, inputs, outputs = w.shape
    width = width or scale_width(format, inputs)
    if inputs % width:
        raise ValueError(f"{inputs} inputs are no multiple of the {width} that share a scale.")
    vectors = jnp.swapaxes(w, -1, -2).reshape(*outer, outputs, inputs // width, width)
    stored = quantize(vectors, format)
    qvalue = stored.qvalue.reshape(*outer, outputs, -1)
    return QuantizedMatrix(qvalue, jnp.swapaxes(stored.scale, -1, -2), format)


def dequantize_matrix(w: QuantizedMatrix, dtype=jnp.float32) -> jax.Array:
    """The matrices [..., in, out] that `w` stands for."""
    *outer, groups, outputs = w.scale.shape
    vectors = w.qvalue.reshape(*outer, outputs, groups, -1)
    by_output = dequantize(Quantized(vectors, jnp.swapaxes(w.scale, -1, -2), w.format), dtype)
    return jnp.swapaxes(by_output.reshape(*outer, outputs, -1), -1, -2)


def _pack(x: jax.Array) -> jax.Array:
    low, high = jnp.split(x, 2, axis=-1)
    return (low & 0xF) | (high << 4)


def unpack(x: jax.Array) -> jax.Array:
    """Both halves of each byte, sign-extended."""
    return jnp.concatenate([(x << 4) >> 4, x >> 4], axis=-1)
