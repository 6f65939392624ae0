"""Arrays stored in 8 or 4 bits with a scale for each vector along the last axis."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Largest magnitude of each format: a vector's largest element is stored as this.
LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}
_STORED = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "int4": jnp.int8}


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
    stored = scaled.astype(_STORED[format])
    return Quantized(_pack(stored) if format == "int4" else stored, scale, format)


def dequantize(x: Quantized, dtype=jnp.float32) -> jax.Array:
    """The array that `x` stands for."""
    values = unpack(x.qvalue) if x.format == "int4" else x.qvalue
    return (values.astype(jnp.float32) * x.scale[..., None]).astype(dtype)


def _pack(x: jax.Array) -> jax.Array:
    low, high = jnp.split(x, 2, axis=-1)
    return (low & 0xF) | (high << 4)


def unpack(x: jax.Array) -> jax.Array:
    """Both halves of each byte, sign-extended."""
    return jnp.concatenate([(x << 4) >> 4, x >> 4], axis=-1)
