"""Mistakes in a call raise a ValueError at trace time that names the value and what is allowed."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.experts import (
    gated_matmul,
    grouped_implementation,
    grouped_matmul,
    grouped_mosaic,
    grouped_xla,
)
from pallas_kernels.quantized import quantize_matrix
from tests.pallas_kernels.hopper import INTERPRET

ARRAYS = ("x", "w", "gate", "up", "group_of_block", "row_scale")


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def call(rows=16, width=64, out=128, dtype=jnp.bfloat16, blocks=2):
    return {
        "x": array(rows, width, dtype=dtype),
        "w": array(4, width, out, dtype=dtype),
        "group_of_block": array(blocks, dtype=jnp.int32),
    }


def stored(format, width):
    """The shapes of quantized matrices of the sizes in `call`."""
    return jax.eval_shape(lambda w: quantize_matrix(w, format, width), array(4, 64, 128))


CALL = call()
MOSAIC = {"implementation": "mosaic_gpu", "interpret": INTERPRET}
TPU = {"implementation": "mosaic_tpu", "interpret": True}
MEGABLOX = {"implementation": "megablox", "interpret": True}
MISTAKES = {
    "width": (
        {"w": array(4, 65, 128)},
        r"w \(4, 65, 128\) must be \[groups, 64, out\], to multiply rows \(16, 64\)",
    ),
    "two types": (
        {"w": array(4, 64, 128, dtype=jnp.float32)},
        "x is bfloat16 and w float32; use one floating type for both",
    ),
    "integers": (call(dtype=jnp.int8), "x is int8 and w int8; use one floating type"),
    "blocks do not divide rows": (call(rows=15), "15 rows must be a positive multiple of the 2"),
    "no blocks": (call(rows=0, blocks=0), "0 rows must be a positive multiple of the 0 blocks"),
    "unknown implementation": (
        {"implementation": "cublas"},
        "implementation 'cublas' is unknown; there are mosaic_gpu, mosaic_tpu, megablox, xla",
    ),
    "implementation without its hardware": (
        {"implementation": "mosaic_gpu"},
        "'mosaic_gpu' does not serve this call: it needs an H100 or H200, and this is cpu",
    ),
    "type for mosaic": (
        MOSAIC | call(dtype=jnp.float32),
        "'mosaic_gpu' does not serve this call: it takes bfloat16, not float32",
    ),
    "block for mosaic": (
        MOSAIC | call(rows=8),
        r"it takes blocks of \(8, 16, 32, 64, 128\) rows, not 4",
    ),
    "width for small blocks": (
        MOSAIC | call(width=96),
        "with blocks of 8 rows it takes widths that are multiples of 64 and 64, not 96 and ",
    ),
    "width for large blocks": (
        MOSAIC | call(rows=256, width=256, out=384),
        "with blocks of 128 rows it takes widths that are multiples of 256 and 256, not 256 ",
    ),
    "scales for mosaic": (
        MOSAIC | {"w": stored("int8", 32)},
        "of int8 it takes one scale for all inputs or a multiple of 128, not for 32",
    ),
    "scales of int4 for mosaic": (
        MOSAIC | {"w": stored("int4", 64)},
        "of int4 it takes one scale for 128 inputs, not 64",
    ),
    "width for quantized matrices": (
        MOSAIC | {"w": stored("int8", 64)},
        "with blocks of 8 rows it takes widths that are multiples of 128 and 64, not 64 and 128",
    ),
    "type for TPUs": (
        TPU | call(dtype=jnp.float16),
        "'mosaic_tpu' does not serve this call: it takes bfloat16 or float32, not float16",
    ),
    "type for quantized matrices on TPUs": (
        TPU | call(dtype=jnp.float32) | {"w": stored("int8", 64)},
        "it multiplies quantized matrices by bfloat16, not float32",
    ),
    "block for TPUs": (
        TPU | call(rows=24, width=128),
        "it takes blocks that are multiples of 8 rows, not 12",
    ),
    "width for TPUs": (TPU, "it takes widths that are multiples of 128, not 64 and 128"),
    "rows too wide for TPUs": (
        TPU | call(width=2**16),
        "blocks of 8 rows of 65536 inputs exceed its VMEM",
    ),
    "scales for TPUs": (
        TPU | {"w": stored("int8", 64)},
        "of int8 it takes one scale for a multiple of 128 inputs, not 64",
    ),
    "scales of int4 for TPUs": (
        TPU | {"w": stored("int4", 64)},
        "of int4 it takes one scale for 128 inputs, not 64",
    ),
    "mosaic_tpu without its hardware": (
        TPU | call(width=128) | {"interpret": None},
        "'mosaic_tpu' does not serve this call: it needs a TPU, and this is cpu",
    ),
    "quantized matrices for megablox": (
        MEGABLOX | {"w": stored("fp8", 64)},
        "'megablox' does not serve this call: it takes plain matrices, not fp8",
    ),
    "megablox without its hardware": (
        {"implementation": "megablox"},
        "'megablox' does not serve this call: it needs a TPU, and this is cpu",
    ),
    "type for megablox": (
        MEGABLOX | call(dtype=jnp.float16),
        "'megablox' does not serve this call: it takes bfloat16 or float32, not float16",
    ),
    "block for megablox": (
        MEGABLOX | call(rows=24),
        "it takes blocks that are multiples of 8 rows, not 12",
    ),
    "interpreter of another": (MOSAIC | {"interpret": True}, "plgpu.InterpretGPUParams"),
}
# Mistakes in the config, which `grouped_implementation` does not take.
CONFIGS = {
    "config of another implementation": (
        {"implementation": "xla", "config": grouped_mosaic.GroupedMosaicConfig()},
        "not for implementation 'xla', which takes "
        r"pallas_kernels\.experts\.grouped_xla\.GroupedXlaConfig",
    ),
    "config of what is not chosen": (
        {"config": grouped_mosaic.GroupedMosaicConfig()},
        "not for implementation 'xla'",
    ),
}
GATED = {
    "matrices of two shapes": (
        {"up": array(4, 64, 64)},
        r"gate bfloat16\(4, 64, 128\) and up bfloat16\(4, 64, 64\) must be alike",
    ),
    "matrices of two types": (
        {"up": array(4, 64, 128, dtype=jnp.float32)},
        r"gate bfloat16\(4, 64, 128\) and up float32\(4, 64, 128\) must be alike",
    ),
    "one of them quantized": (
        {"up": stored("int8", 64)},
        r"gate bfloat16\(4, 64, 128\) and up int8\(4, 64, 128\) with scales for 64 inputs must be",
    ),
    "scale of a block": (
        {"row_scale": array(2, dtype=jnp.float32)},
        r"row_scale has shape \(2,\); it must be \(16,\)",
    ),
    "scale of each value": (
        {"row_scale": array(16, 1, dtype=jnp.float32)},
        r"row_scale has shape \(16, 1\); it must be \(16,\)",
    ),
}


def parametrize(mistakes):
    return pytest.mark.parametrize(("change", "says"), mistakes.values(), ids=mistakes)


def traced(function, **arguments):
    arrays = {name: arguments.pop(name) for name in ARRAYS if name in arguments}
    return jax.jit(functools.partial(function, **arguments)).trace(**arrays).out_info


def gate_and_up(w, **arguments):
    return {"gate": w, "up": w} | arguments


@parametrize(MISTAKES | CONFIGS)
def test_mistake(untyped, change, says):
    with pytest.raises(ValueError, match=says):
        traced(grouped_matmul, **CALL | change)


@parametrize(MISTAKES)
def test_mistake_when_asked_for_the_implementation(untyped, change, says):
    with pytest.raises(ValueError, match=says):
        grouped_implementation(**CALL | change)


@parametrize(MISTAKES | CONFIGS)
def test_mistake_in_a_gated_product(untyped, change, says):
    with pytest.raises(ValueError, match=says):
        traced(gated_matmul, **gate_and_up(**CALL | change))


@parametrize(GATED)
def test_mistake_in_a_gated_product_alone(untyped, change, says):
    with pytest.raises(ValueError, match=says):
        traced(gated_matmul, **gate_and_up(**CALL) | change)


def test_the_call_without_a_mistake():
    """The call that every case changes by one mistake is itself correct."""
    assert grouped_implementation(**CALL) == "xla"
    assert grouped_implementation(**CALL, **MOSAIC) == "mosaic_gpu"
    assert grouped_implementation(**call(width=128), **TPU) == "mosaic_tpu"
    assert grouped_implementation(**CALL, interpret=True) == "megablox"
    scale = {"row_scale": array(16)}
    for out in (
        traced(grouped_matmul, **CALL, config=grouped_xla.GroupedXlaConfig()),
        traced(gated_matmul, **gate_and_up(**CALL), **scale),
    ):
        assert (out.shape, out.dtype) == ((16, 128), jnp.bfloat16)
