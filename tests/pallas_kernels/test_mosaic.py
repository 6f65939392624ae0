"""What the Hopper kernels share, against plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compile.absent import absent_h100s, lower_for
from pallas_kernels.mosaic import half_masks, hopper_kernel, widen
from pallas_kernels.quantized import STORED, unpack
from pallas_kernels.step import add_rms_norm

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


@pytest.mark.absent_gpu
def test_a_program_compiles_a_kernel_once():
    """However many layers call it: a second number in its name would make a second kernel."""
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 512), (512,)))

    @jax.jit
    def layer(x, w):
        return add_rms_norm(x, None, w, 1e-5)[1]

    def layers(x, w):
        other = add_rms_norm(layer(x, w), None, w, 1e-5)[1]  # of another layer kind
        return add_rms_norm(other, None, w, 1e-6)[1]

    (h100,) = absent_h100s(1)
    assert lower_for(h100, layers, x, w).as_text().count("custom_call @mosaic_gpu_v2") == 2


def test_named_arguments_of_a_kernel_are_refused():
    with pytest.raises(ValueError, match=r"\['eps'\] must be positional"):
        hopper_kernel(functools.partial(print, eps=1), interpret=None)
