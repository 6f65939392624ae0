"""Kernels of a decode step, compiled for absent TPUs at Scout's and Maverick's sizes."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.compile.absent import absent_tpus, lower_for
from pallas_kernels.quantized import in_pairs, quantize, quantize_matrix
from pallas_kernels.step import (
    HeadPlan,
    add_rms_norm,
    experts_down,
    experts_gate_up,
    matmul_few,
    write_heads,
)

D, d = 5120, 128
pytestmark = [
    pytest.mark.absent_tpu,
    pytest.mark.parametrize(
        ("topology", "tokens"), [("v5p:2x2x1", 1), ("v6e:2x2", 64), ("tpu7x:2x2x1", 64)]
    ),
]


def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def matrix(*shape, format=None):
    w = shaped(*shape)
    return w if format is None else jax.eval_shape(lambda w: quantize_matrix(w, format), w)


def temporaries(topology, function, *arguments):
    """Bytes; compiling fails where a kernel exceeds the memory of the chip's cores."""
    compiled = lower_for(absent_tpus(topology)[0], function, *arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("format", [None, "int8", "fp8", "int4"])
@pytest.mark.parametrize("devices", [1, 8])
def test_products(topology, tokens, devices, format):
    """No matrix is widened or transposed in memory."""
    heads = (D // d // devices, 8 // devices, 8 // devices)
    made = [matrix(D, n * d, format=format) for n in heads]
    x = shaped(tokens, D)
    assert temporaries(topology, lambda x, *w: matmul_few(x, w), x, *made) < 2**23
    o, x = matrix(D // devices, D, format=format), shaped(tokens, D // d // devices, d)
    assert temporaries(topology, lambda x, w: matmul_few(x, (w,)), x, o) < 2**23


@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize(("experts", "devices"), [(16, 8), (128, 8), (16, 1)])
def test_experts(topology, tokens, experts, devices, format):
    F, N = 8192 // devices, min(tokens, experts) + 1
    up, down = matrix(experts, D, F, format=format), matrix(experts, F, D, format=format)
    shared_up, shared_down = matrix(D, F, format=format), matrix(F, D, format=format)
    rows, numbers = -(-tokens // 8) * 8, shaped(tokens, dtype=jnp.int32)

    def run(x, up, shared_up, down, shared_down, expert, weight, busy):
        hidden = experts_gate_up(x, (up, up), (shared_up,) * 2, expert, weight, busy)
        return experts_down(hidden, down, shared_down, expert, busy)

    weight, busy = shaped(tokens, dtype=jnp.float32), shaped(N, dtype=jnp.int32)
    arrays = shaped(tokens, D), up, shared_up, down, shared_down, numbers, weight, busy
    assert temporaries(topology, run, *arrays) < 2**22 + 2 * N * rows * F


@pytest.mark.parametrize(
    ("kv_heads", "format"),
    [*((1, format) for format in (None, "int8", "fp8", "int4")), (8, None), (8, "int4")],
)
def test_heads(topology, tokens, kv_heads, format):
    """Key heads of one of eight devices, and all in the widest format and in that of pairs."""
    heads = 5 * kv_heads
    pool = shaped(1024, kv_heads, 128, d)
    if format is not None:
        pool = jax.eval_shape(lambda x: in_pairs(quantize(x, format)), pool)
    qkv = shaped(1, -(-tokens // 8) * 8, (heads + 2 * kv_heads) * d, dtype=jnp.float32)
    angle, slot = shaped(64, d, dtype=jnp.float32), shaped(tokens, dtype=jnp.int32)

    def run(qkv, cos, sin, slot, k, v):
        return write_heads(
            qkv, HeadPlan(cos, sin, None, slot), k, v, heads=heads, norm_eps=1e-5
        )  # fmt: skip

    temporaries(topology, run, qkv, angle, angle, slot, pool, pool)


def test_norm(topology, tokens):
    norm = functools.partial(add_rms_norm, eps=1e-5)
    more = shaped(-(-tokens // 8) * 8, D, dtype=jnp.float32)
    temporaries(topology, norm, shaped(tokens, D), more, shaped(D))
