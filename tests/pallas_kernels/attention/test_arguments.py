"""Mistakes in a call are ValueErrors at trace time, each naming the value and what is allowed."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import (
    coords_of,
    flash_attention,
    flash_implementation,
    flash_mosaic,
    flash_xla,
)

CALL = {
    "q": jax.ShapeDtypeStruct((2, 4, 8, 64), jnp.bfloat16),
    "k": jax.ShapeDtypeStruct((2, 2, 8, 64), jnp.bfloat16),
    "v": jax.ShapeDtypeStruct((2, 2, 8, 64), jnp.bfloat16),
    "scale": 0.125,
}
TRACED = ("q", "k", "v", "q_coords", "k_coords")


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def keys(*shape):
    return {"k": array(*shape), "v": array(*shape)}


MISTAKES = {
    "head size of the keys": (keys(2, 2, 8, 32), r"k \(2, 2, 8, 32\) .* head size 64 of q"),
    "rows of the keys": (keys(1, 2, 8, 64), r"k \(1, 2, 8, 64\) .* the 2 rows"),
    "values unlike the keys": ({"v": array(2, 2, 7, 64)}, r"v \(2, 2, 7, 64\) must both be"),
    "keys without a head axis": (keys(2, 8, 64), r"k \(2, 8, 64\)"),
    "queries without a head axis": ({"q": array(2, 8, 64)}, r"q \(2, 8, 64\)"),
    "heads": (keys(2, 3, 8, 64), "4 query heads must be a multiple of 3 key heads"),
    "no key heads": (keys(2, 0, 8, 64), r"k \(2, 0, 8, 64\)"),
    "several types": (
        {"q": array(2, 4, 8, 64, dtype=jnp.float32)},
        "q, k, v are float32, bfloat16, bfloat16; use one floating type",
    ),
    "integers": (
        {name: array(2, 2, 8, 64, dtype=jnp.int32) for name in "qkv"},
        "q, k, v are int32, int32, int32; use one floating type",
    ),
    "no chunk": ({"chunk": 0}, "chunk 0 must be 1 or more, or None"),
    "negative chunk": ({"chunk": -16}, "chunk -16 must be 1 or more, or None"),
    "no scale": ({"scale": 0.0}, "scale 0.0 must be positive"),
    "negative scale": ({"scale": -0.125}, "scale -0.125 must be positive"),
    "scale that is no number": ({"scale": float("nan")}, "scale nan must be positive"),
    "coordinates of the keys alone": (
        {"k_coords": coords_of(2, 8)},
        "8 queries and 8 keys need q_coords",
    ),
    "more queries than keys": (keys(2, 2, 5, 64), "8 queries and 5 keys need q_coords"),
    "in order, of unequal length": (
        {**keys(2, 2, 9, 64), "in_order": True},
        "in_order needs as many queries as keys, not 8 and 9",
    ),
    "rows of the coordinates": (
        {"q_coords": coords_of(1, 8)},
        r"q_coords has shape \(1, 8\); it must be \(2, 8\)",
    ),
    "length of the keys' coordinates": (
        {"q_coords": coords_of(2, 8), "k_coords": coords_of(2, 9)},
        r"k_coords has shape \(2, 9\); it must be \(2, 8\)",
    ),
    "segments unlike positions": (
        {"q_coords": coords_of(2, 8)._replace(segment=jnp.ones((2, 7), jnp.int32))},
        r"q_coords has shape \(2, 7\); it must be \(2, 8\)",
    ),
    "unknown implementation": (
        {"implementation": "flash"},
        "implementation 'flash' is unknown; there are mosaic_gpu, cudnn, splash, xla",
    ),
    "log-sum-exp of cuDNN": (
        {"implementation": "cudnn", "return_lse": True, "interpret": True},
        "'cudnn' does not serve this call: JAX rounds its log-sum-exp to the type of the queries",
    ),
    "cuDNN without its hardware": (
        {"implementation": "cudnn"},
        "needs an NVIDIA GPU of compute capability 8.0 or newer, and this is cpu",
    ),
    "implementation without its hardware": (
        {"implementation": "mosaic_gpu"},
        "'mosaic_gpu' does not serve this call: it needs an H100 or H200, and this is cpu",
    ),
}
# What `flash_implementation`, which takes no config, does not see.
CONFIGS = {
    "config of another implementation": (
        {"implementation": "xla", "config": flash_mosaic.FlashMosaicConfig()},
        "not for implementation 'xla', which takes "
        "pallas_kernels.attention.flash_xla.FlashXlaConfig",
    ),
    "config that is a dict": (
        {"implementation": "xla", "config": {"block_q": 8}},
        "not for implementation 'xla', which takes "
        "pallas_kernels.attention.flash_xla.FlashXlaConfig",
    ),
    "config of what is not chosen": (
        {"config": flash_mosaic.FlashMosaicConfig()},
        "not for implementation 'xla'",
    ),
}


def parametrize(mistakes):
    return pytest.mark.parametrize(("change", "says"), mistakes.values(), ids=mistakes)


def traced(trace, **arguments):
    arrays = {name: arguments.pop(name) for name in TRACED if name in arguments}
    return trace(functools.partial(flash_attention, **arguments), **arrays)


def by_jit(function, **arrays):
    return jax.jit(function).trace(**arrays).out_info


@pytest.mark.parametrize("trace", [jax.eval_shape, by_jit])
@parametrize(MISTAKES | CONFIGS)
def test_mistake(untyped, trace, change, says):
    with pytest.raises(ValueError, match=says):
        traced(trace, **CALL | change)


@parametrize(MISTAKES)
def test_mistake_when_asked_for_the_implementation(untyped, change, says):
    with pytest.raises(ValueError, match=says):
        flash_implementation(**CALL | change)


@pytest.mark.parametrize("trace", [jax.eval_shape, by_jit])
def test_the_call_without_a_mistake(trace):
    """That all the others differ from by their mistake alone."""
    out = traced(trace, **CALL)
    assert (out.shape, out.dtype) == ((2, 4, 8, 64), jnp.bfloat16)
    assert flash_implementation(**CALL) == "xla"
    out, lse = traced(trace, **CALL, return_lse=True, config=flash_xla.FlashXlaConfig(8, 8))
    assert (lse.shape, lse.dtype) == ((2, 4, 8), jnp.float32)
