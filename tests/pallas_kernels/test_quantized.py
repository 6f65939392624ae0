"""Arrays in 8 or 4 bits: how far they are from what they stand for, and how they are stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized import (
    LARGEST,
    Quantized,
    dequantize,
    dequantize_matrix,
    quantize,
    quantize_matrix,
    unpack,
)

STORED = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "int4": jnp.int8}
every_format = pytest.mark.parametrize("format", LARGEST)


def vectors(scale=1.0):
    """Vectors of sizes from 2^-20 to 2^20 times `scale`, with elements that differ as much."""
    rng = np.random.default_rng(0)
    sizes = 2.0 ** rng.integers(-20, 21, (3, 50, 1)) * scale
    skew = 2.0 ** (rng.integers(-12, 1, (3, 50, 16)) * rng.integers(0, 2, (3, 50, 1)))
    return (sizes * skew * rng.standard_normal((3, 50, 16))).astype(np.float32)


def largest_error(x, format):
    """Half a step, which for fp8 grows with the value from 2^-9 on."""
    step = np.abs(x).max(-1, keepdims=True) / LARGEST[format]
    if format == "fp8":
        step = np.maximum(np.abs(x) * 2**-3, step * 2**-9)
    return step / 2


def quantize_in_float64(x, format):
    """Stored values, before any packing."""
    x = x.astype(np.float64)
    scaled = x / np.abs(x).max(-1, keepdims=True) * LARGEST[format]
    return scaled.astype(STORED["fp8"]) if format == "fp8" else np.round(scaled)


def values(x: Quantized):
    return np.asarray(unpack(x.qvalue) if x.format == "int4" else x.qvalue).astype(np.float32)


@every_format
@pytest.mark.parametrize("scale", [1.0, 2.0**-80, 2.0**100])
def test_error(format, scale):
    x = vectors(scale)
    error = np.abs(np.asarray(dequantize(quantize(jnp.asarray(x), format))) - x)
    assert (error <= largest_error(x, format) * (1 + 1e-5)).all()


@every_format
def test_rounds_to_the_nearest(format):
    """Ties aside, of which there are none."""
    x = vectors()
    got = values(quantize(jnp.asarray(x), format))
    np.testing.assert_array_equal(got, quantize_in_float64(x, format).astype(np.float32))


@every_format
def test_largest_element_is_the_largest_value(format):
    """Either sign has the same size: catches -128 and -8, which have no opposite."""
    x = vectors()
    for got in (values(quantize(jnp.asarray(y), format)) for y in (x, -x)):
        np.testing.assert_array_equal(np.abs(got).max(-1), LARGEST[format])


@every_format
def test_values_of_the_format_are_exact(format):
    """Every value, with scales that are powers of two."""
    most = int(LARGEST[format])
    if format == "fp8":
        every = np.arange(256, dtype=np.uint8).view(STORED["fp8"]).astype(np.float32)
        every = np.nan_to_num(every)
    else:
        every = np.arange(-most - 1, most + 1).clip(-most)
    x = every * np.array([[2.0**-30], [1.0], [2.0**30]], np.float32)
    np.testing.assert_array_equal(dequantize(quantize(jnp.asarray(x), format)), x)


@every_format
def test_zeros(format):
    """Alone or beside other vectors, no NaN."""
    x = np.zeros((2, 8), np.float32)
    x[1] = 3
    stored = quantize(jnp.asarray(x), format)
    np.testing.assert_array_equal(dequantize(stored)[0], 0)
    np.testing.assert_allclose(dequantize(stored)[1], 3, rtol=1e-6)
    assert stored.scale[0] == 0


@every_format
@pytest.mark.parametrize("largest", [3.4e38, 1.2e-38, 1e-44])
def test_the_ends_of_float32(format, largest):
    """Values so small that their scale is no normal number may become zeros, nothing else."""
    x = largest * np.array([1, -1, 0, 0.5, -0.25, 0.1, 1, 1], np.float32)
    got = np.asarray(dequantize(quantize(jnp.asarray(x), format))).astype(np.float64)
    error = np.abs(got - x)
    assert (error <= np.maximum(largest_error(x, format) * (1 + 1e-5), 1.2e-38)).all()


@every_format
def test_each_vector_has_its_own_scale(format):
    x = vectors()
    whole = quantize(jnp.asarray(x), format)
    assert (whole.scale.shape, whole.scale.dtype) == (x.shape[:-1], jnp.float32)
    np.testing.assert_allclose(whole.scale, np.abs(x).max(-1) / LARGEST[format], rtol=1e-6)
    alone = [values(quantize(jnp.asarray(row), format)) for row in x]
    np.testing.assert_array_equal(values(whole), alone)


@every_format
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types(format, dtype):
    """Catches scales and quotients that are not float32."""
    x = jnp.asarray(vectors(2.0**-6)).clip(-1e4, 1e4).astype(dtype)
    got, want = quantize(x, format), quantize(x.astype(jnp.float32), format)
    for y, z in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert y.dtype == z.dtype
        np.testing.assert_array_equal(y.astype(jnp.float32), z.astype(jnp.float32))
    back = dequantize(got, dtype)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, dequantize(want).astype(dtype))


@every_format
def test_what_is_stored(format):
    stored = quantize(jnp.asarray(vectors()), format)
    assert stored.shape == (3, 50, 16)
    assert stored.qvalue.shape == (3, 50, 8 if format == "int4" else 16)
    assert stored.qvalue.dtype == STORED[format]


def test_int4_halves():
    """Byte i holds element i in its low half and element i + d / 2 in its high half."""
    x = np.array([7, -7, 1, -1, 0, 3, -5, -2], np.float32)
    stored = quantize(jnp.asarray(x), "int4")
    np.testing.assert_array_equal(np.asarray(stored.qvalue) & 15, x[:4].astype(np.int8) & 15)
    np.testing.assert_array_equal(np.asarray(stored.qvalue) >> 4, x[4:])


def test_unpack_extends_the_sign():
    """Each half of every byte keeps its sign."""
    every = np.arange(-128, 128)
    low = (every + 8) % 16 - 8
    np.testing.assert_array_equal(unpack(jnp.asarray(every, jnp.int8)), [*low, *(every >> 4)])


@every_format
def test_crosses_jit(format):
    """The format is known at trace time."""
    x = jnp.asarray(vectors())
    stored = jax.jit(quantize, static_argnums=1)(x, format)
    assert stored.format == format
    np.testing.assert_array_equal(jax.jit(dequantize)(stored), dequantize(stored))
    shapes = jax.eval_shape(lambda x: quantize(x, format), x)
    assert shapes.shape == x.shape


def test_mistakes():
    with pytest.raises(ValueError, match="format 'int2' is unknown; there are int8, fp8, int4"):
        quantize(jnp.ones((2, 8)), "int2")
    with pytest.raises(
        ValueError, match="int4 stores two elements a byte, and the last axis has 7"
    ):
        quantize(jnp.ones((2, 7)), "int4")


@every_format
@pytest.mark.parametrize("width", [8, 16, None])
def test_matrices(format, width):
    """Each output's inputs, in widths, are vectors."""
    w = vectors()[..., :48, :].reshape(3, 16, 48)
    stored = quantize_matrix(jnp.asarray(w), format, width)
    by_output = np.swapaxes(w, 1, 2).reshape(3, 48, -1, stored.group_size)
    want = dequantize(quantize(jnp.asarray(by_output), format)).reshape(3, 48, 16)
    got = dequantize_matrix(stored)
    assert got.shape == stored.shape == w.shape
    assert stored.group_size == (width or 16)
    np.testing.assert_array_equal(got, np.swapaxes(want, 1, 2))
    assert stored.scale.shape == (3, 16 // stored.group_size, 48)
    assert stored.qvalue.shape == (3, 48, 8 if format == "int4" else 16)


def test_widths_are_packed_apart():
    """A device that holds some of the inputs holds their bytes: int4's halves are of one width."""
    w = jnp.asarray(vectors().reshape(-1, 16)[:16])
    whole, first = (quantize_matrix(x, "int4", 8) for x in (w, w[:8]))
    np.testing.assert_array_equal(whole.qvalue[:, :4], first.qvalue)
    np.testing.assert_array_equal(whole.scale[:1], first.scale)


def test_int4_matrices_share_scales_in_widths_of_128():
    scales = [quantize_matrix(jnp.ones((n, 2)), "int4").scale.shape for n in (64, 256, 192)]
    assert scales == [(1, 2), (2, 2), (2, 2)]
    with pytest.raises(ValueError, match="200 inputs are no multiple of the 128 that share"):
        quantize_matrix(jnp.ones((200, 2)), "int4", 128)
