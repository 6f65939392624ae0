"""What the Hopper kernels share, against plain JAX."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic import half_masks, widen
from pallas_kernels.quantized import STORED, unpack

BYTES = jnp.arange(-128, 128, dtype=jnp.int8)


@pytest.mark.parametrize("index", [0, 131071])
def test_both_halves_of_every_byte_are_widened_exactly(index):
    """Also -8, which quantization never makes and files may have."""
    low, high = widen(BYTES, half_masks(jnp.int32(index)))
    assert low.dtype == high.dtype == jnp.bfloat16
    np.testing.assert_array_equal(jnp.concatenate([low, high]), unpack(BYTES))


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_every_byte_is_widened_exactly(format):
    values = BYTES.view(STORED[format])
    (wide,) = widen(values)
    assert wide.dtype == jnp.bfloat16
    np.testing.assert_array_equal(wide.astype(jnp.float32), values.astype(jnp.float32))
