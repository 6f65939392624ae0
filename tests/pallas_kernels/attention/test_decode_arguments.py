"""Mistakes in a call are ValueErrors at trace time, each naming the value and what is allowed."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import coords_of, decode_attention, decode_implementation, flash_xla
from pallas_kernels.attention.decode_config import DecodeConfig
from pallas_kernels.quantized import quantize


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def quantized(format, *shape):
    return jax.eval_shape(functools.partial(quantize, format=format), array(*shape))


def both(x):
    return {"k": x, "v": x}


CALL = {
    "q": array(2, 4, 1, 128),
    **both(array(2, 2, 128, 128)),
    "q_coords": coords_of(2, 1),
    "scale": 0.125,
}
TRACED = ("q", "k", "v", "q_coords", "k_coords", "table")
PAGED = {
    **both(array(7, 2, 64, 128)),
    "k_coords": coords_of(7, 64),
    "table": array(2, 3, dtype=jnp.int32),
}
KERNEL = {"implementation": "mosaic_gpu", "interpret": plgpu.InterpretGPUParams()}

MISTAKES = {
    "head size of the keys": (both(array(2, 2, 128, 64)), r"k \(2, 2, 128, 64\) .* head size 128"),
    "rows of the keys": (both(array(3, 2, 128, 128)), r"k \(3, 2, 128, 128\) .* the 2 rows"),
    "values unlike the keys": ({"v": array(2, 2, 127, 128)}, r"v \(2, 2, 127, 128\) must both be"),
    "keys without a head axis": (both(array(2, 128, 128)), r"k \(2, 128, 128\)"),
    "queries without a head axis": ({"q": array(2, 1, 128)}, r"q \(2, 1, 128\)"),
    "head size of int4": (both(quantized("int4", 2, 2, 128, 64)), r"k \(2, 2, 128, 64\)"),
    "pages unlike one another": (
        PAGED | {"v": array(7, 2, 128, 128)},
        r"v \(7, 2, 128, 128\) must both be pages of one shape",
    ),
    "heads": (both(array(2, 3, 128, 128)), "4 query heads must be a multiple of 3 key heads"),
    "no key heads": (both(array(2, 0, 128, 128)), r"k \(2, 0, 128, 128\)"),
    "no keys": (both(array(2, 2, 0, 128)), r"k \(2, 2, 0, 128\)"),
    "values alone quantized": (
        {"v": quantized("int8", 2, 2, 128, 128)},
        "k, v are bfloat16, int8 and q is bfloat16; use one format",
    ),
    "several formats": (
        {"k": quantized("int8", 2, 2, 128, 128), "v": quantized("fp8", 2, 2, 128, 128)},
        "k, v are int8, fp8 and q is bfloat16; use one format",
    ),
    "several types": (
        {"v": array(2, 2, 128, 128, dtype=jnp.float32)},
        "k, v are bfloat16, float32 and q is bfloat16; use one format",
    ),
    "queries of integers": (
        {"q": array(2, 4, 1, 128, dtype=jnp.int32)},
        "q is int32; use one format for the cache, floating or Quantized, and a floating type",
    ),
    "keys of integers without scales": (
        both(array(2, 2, 128, 128, dtype=jnp.int8)),
        "k, v are int8, int8",
    ),
    "no chunk": ({"chunk": 0}, "chunk 0 must be 1 or more, or None"),
    "negative chunk": ({"chunk": -16}, "chunk -16 must be 1 or more, or None"),
    "no scale": ({"scale": 0.0}, "scale 0.0 must be positive"),
    "negative scale": ({"scale": -0.125}, "scale -0.125 must be positive"),
    "scale that is no number": ({"scale": float("nan")}, "scale nan must be positive"),
    "rows of the table": (
        PAGED | {"table": array(3, 3, dtype=jnp.int32)},
        r"table has shape \(3, 3\); it must be \(2, pages of a row\)",
    ),
    "table of one row": (
        PAGED | {"table": array(2, dtype=jnp.int32)},
        r"table has shape \(2,\); it must be \(2, pages of a row\)",
    ),
    "pages without coordinates": (
        PAGED | {"k_coords": None},
        "with a table, k_coords of the pool's pages are needed",
    ),
    "rows of the coordinates": (
        {"q_coords": coords_of(1, 1)},
        r"q_coords has shape \(1, 1\); it must be \(2, 1\)",
    ),
    "length of the keys' coordinates": (
        {"k_coords": coords_of(2, 129)},
        r"k_coords has shape \(2, 129\); it must be \(2, 128\)",
    ),
    "length of the pages' coordinates": (
        PAGED | {"k_coords": coords_of(2, 64)},
        r"k_coords has shape \(2, 64\); it must be \(7, 64\)",
    ),
    "segments unlike positions": (
        {"q_coords": coords_of(2, 1)._replace(segment=jnp.ones((2, 2), jnp.int32))},
        r"q_coords has shape \(2, 2\); it must be \(2, 1\)",
    ),
    "unknown implementation": (
        {"implementation": "splash"},
        "implementation 'splash' is unknown; there are mosaic_gpu, mosaic_tpu, xla",
    ),
    "implementation without its hardware": (
        {"implementation": "mosaic_gpu"},
        "'mosaic_gpu' does not serve this call: it needs an H100 or H200, and this is cpu",
    ),
    "float32 queries of the kernel": (
        KERNEL | {"q": array(2, 4, 1, 128, dtype=jnp.float32)},
        "it takes bfloat16 queries, not float32",
    ),
    "float32 keys of the kernel": (
        KERNEL | both(array(2, 2, 128, 128, dtype=jnp.float32)),
        "not a cache of float32",
    ),
    "head size of the kernel": (
        KERNEL | {"q": array(2, 4, 1, 256), **both(array(2, 2, 128, 256))},
        "it takes head size 128, or 64 without int4, not 256",
    ),
    "head size 64 of the kernel's int4": (
        KERNEL | {"q": array(2, 4, 1, 64), **both(quantized("int4", 2, 2, 128, 64))},
        "it takes head size 128, or 64 without int4, not 64",
    ),
    "too many queries for the kernel": (
        KERNEL | {"q": array(2, 26, 5, 128), "q_coords": coords_of(2, 5)},
        "it takes up to 24 queries times heads that share a key head, not 65",
    ),
    "small pages for the kernel": (
        KERNEL | PAGED | both(array(7, 2, 96, 128)) | {"k_coords": coords_of(7, 96)},
        "it takes pages of a multiple of 64 keys, not 96",
    ),
}
# What `decode_implementation`, which takes no config, does not see.
CONFIGS = {
    "config of another implementation": (
        {"implementation": "xla", "config": DecodeConfig()},
        "not for implementation 'xla', which takes "
        "pallas_kernels.attention.flash_xla.FlashXlaConfig",
    ),
    "config that is a dict": (
        {**KERNEL, "config": {"block_k": 64}},
        "not for implementation 'mosaic_gpu', which takes .*DecodeConfig",
    ),
    "config of what is not chosen": ({"config": DecodeConfig()}, "not for implementation 'xla'"),
    "block larger than a page": (
        KERNEL | PAGED | {"config": DecodeConfig(block_k=128)},
        "block_k 128",
    ),
}


def parametrize(mistakes):
    return pytest.mark.parametrize(("change", "says"), mistakes.values(), ids=mistakes)


def traced(trace=jax.eval_shape, **arguments):
    arrays = {name: arguments.pop(name) for name in TRACED if name in arguments}
    return trace(functools.partial(decode_attention, **arguments), **arrays)


def traced_by_jit(function, **arrays):
    return jax.jit(function).trace(**arrays).out_info


@parametrize(MISTAKES | CONFIGS)
@pytest.mark.parametrize("trace", [jax.eval_shape, traced_by_jit])
def test_mistake(untyped, trace, change, says):
    with pytest.raises(ValueError, match=says):
        traced(trace, **CALL | change)


@parametrize(MISTAKES)
def test_mistake_when_asked_for_the_implementation(untyped, change, says):
    with pytest.raises(ValueError, match=says):
        decode_implementation(**CALL | change)


def test_the_call_without_a_mistake():
    """That all the others differ from by their mistake alone."""
    out = traced(**CALL)
    assert (out.shape, out.dtype) == ((2, 4, 1, 128), jnp.bfloat16)
    out, lse = traced(**CALL | PAGED, return_lse=True, config=flash_xla.FlashXlaConfig(block_k=64))
    assert (lse.shape, lse.dtype) == ((2, 4, 1), jnp.float32)
    assert decode_implementation(**CALL) == decode_implementation(**CALL | PAGED) == "xla"


@pytest.mark.parametrize("cache", ["bfloat16", "int8", "fp8", "int4"])
def test_the_kernel_is_picked_where_it_serves(cache):
    call = CALL | {"interpret": KERNEL["interpret"]}
    if cache != "bfloat16":
        call |= both(quantized(cache, 2, 2, 128, 128))
    assert decode_implementation(**call) == "mosaic_gpu"
    assert decode_implementation(**call | {"q": array(2, 4, 33, 128), "q_coords": None}) == "xla"
