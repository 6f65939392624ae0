"""Products with quantized matrices agree with float64 NumPy on the dequantized ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.experts import grouped_matmul
from pallas_kernels.quantized import QuantizedMatrix, dequantize_matrix, quantize_matrix
from tests.pallas_kernels.attention.cases import TOLERANCE, assert_close
from tests.pallas_kernels.experts.cases import (
    FORWARD_CASES,
    KERNEL_CASES,
    Arrays,
    draw,
    judge,
    judge_gated,
    named,
    on_tpus,
    planned,
)
from tests.pallas_kernels.experts.ways import (
    MOSAIC_GPU,
    MOSAIC_TPU,
    XLA,
    XLA_LOOP,
    gated,
    multiplied,
    over,
    runs,
)

# Format and group_size: all inputs share a scale, or every 128 do.
STORED = {"int8": None, "fp8": None, "int4": 128, "int8-128": 128, "fp8-128": 128}
LONG = [dataclasses.replace(KERNEL_CASES[i], D=512) for i in (1, 6)]
every_format = pytest.mark.parametrize("stored", STORED)
SMALL = [dataclasses.replace(named(name), D=6) for name in ("uneven", "some without a group")]
FEW = [named(case.name) for case in (KERNEL_CASES[1], KERNEL_CASES[3], KERNEL_CASES[6])]
# Rows of few, and of more than `FEW_ROWS`; an odd number of groups of int4.
TPU_FEW = [*on_tpus([*FEW[1:], FORWARD_CASES[1]]), dataclasses.replace(FEW[0], D=128, F=128)]
every_case = over(
    runs(XLA, "float32", SMALL),
    runs(XLA, "bfloat16", FEW),
    runs(XLA_LOOP, "float32", FEW),
    runs(MOSAIC_GPU, "bfloat16", KERNEL_CASES[:6:2] + KERNEL_CASES[6:] + FORWARD_CASES),
    runs(MOSAIC_TPU, "bfloat16", TPU_FEW),
)


def quantized(stored: str, w: np.ndarray) -> QuantizedMatrix:
    width = STORED[stored] if w.shape[1] % 128 == 0 else None
    return in_format(stored.partition("-")[0], width, w)


def in_format(format: str, width: int | None, w: np.ndarray) -> QuantizedMatrix:
    return quantize_matrix(jnp.asarray(w, jnp.float32), format, width)


def prepared(stored, case, dtype) -> tuple[Arrays, QuantizedMatrix, QuantizedMatrix]:
    """The case's arrays with dequantized matrices, and the quantized gate and up."""
    arrays = draw(case, dtype)
    gate, up = (quantized(stored, w) for w in (arrays.gate, arrays.up))
    stand_for = {"gate": dequantize_matrix(gate), "up": dequantize_matrix(up)}
    return arrays._replace(**{name: np.asarray(w) for name, w in stand_for.items()}), gate, up


@every_format
@every_case
def test_products(way, dtype, case, stored):
    arrays, _, up = prepared(stored, case, dtype)
    got = way.call(multiplied, planned(case), arrays.x, up)
    assert got.dtype == dtype
    assert_close(got, judge(case, arrays).out, TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("format, width", [("fp8", 256), ("int8", 128), ("int4", 128)])
@over(
    runs(XLA, "bfloat16", LONG),
    runs(MOSAIC_GPU, "bfloat16", LONG),
    runs(MOSAIC_TPU, "bfloat16", on_tpus(LONG)),
)
def test_more_steps_than_slots(way, dtype, case, format, width):
    """Several steps may share a scale, as in Meta's fp8 `down`, with a scale per rank's inputs."""
    arrays = draw(case, dtype)
    arrays.up[:, 256:] *= 3  # else all scales would be about equal
    up = in_format(format, width, arrays.up)
    got = way.call(multiplied, planned(case), arrays.x, up)
    arrays = arrays._replace(up=np.asarray(dequantize_matrix(up)))
    assert_close(got, judge(case, arrays).out, TOLERANCE[dtype])


@every_format
@over(
    runs(XLA, "bfloat16", FEW[:1]),
    runs(MOSAIC_GPU, "bfloat16", [KERNEL_CASES[1], KERNEL_CASES[6], FORWARD_CASES[2]]),
    runs(MOSAIC_TPU, "bfloat16", TPU_FEW[:1]),
)
def test_gated_products(way, dtype, case, stored):
    arrays, gate, up = prepared(stored, case, dtype)
    got = way.call(gated, planned(case), arrays.x, arrays.scale, gate, up)
    assert_close(got, judge_gated(case, arrays).out, TOLERANCE[dtype])


@pytest.mark.parametrize("format", ["fp8", "int4"])
@pytest.mark.parametrize("fp8", ["float8_e4m3fn", "float8_e4m3b11fnuz"])
@pytest.mark.parametrize("block", [8, 32])
def test_every_byte_on_tpus(block, fp8, format):
    """Products with rows of the identity are the values, whatever fp8 type the MXU takes.

    Catches -0 taken for NaN, NaN taken for a number, and halves of bytes in the wrong order.
    """
    config = dataclasses.replace(MOSAIC_TPU.config, fp8=fp8)
    way = dataclasses.replace(MOSAIC_TPU, config=config)
    bytes_of_row = jnp.roll(jnp.arange(256, dtype=jnp.uint8), 7)
    qvalue = jnp.tile(bytes_of_row, (128, 1)).view(
        jnp.int8 if format == "int4" else jnp.float8_e4m3fn
    )
    if format == "fp8":  # NaN in all rows of one output
        qvalue = jnp.where(jnp.isnan(qvalue) & (jnp.arange(128) > 0)[:, None], 1, qvalue)
    inputs = 512 if format == "int4" else 256
    w = QuantizedMatrix(qvalue[None], jnp.ones((1, inputs // 128, 128)), format)
    case = dataclasses.replace(FEW[0], group=(0,) * inputs, E=1, block=block, D=inputs, F=128)
    got = way.call(multiplied, planned(case), jnp.eye(inputs, dtype=jnp.bfloat16), w)
    np.testing.assert_array_equal(got.astype(np.float32), np.eye(inputs) @ dequantize_matrix(w)[0])


@functools.partial(jax.jit, static_argnums=0)
def gradients(options, plan, x, scale, gate, up, d_out):
    """The gradients by everything but the matrices."""
    f = functools.partial(gated, options, plan)
    _, transpose = jax.vjp(lambda x, scale: f(x, scale, gate, up), x, scale)
    return transpose(d_out)


@pytest.mark.parametrize("stored", ["int8", "int4"])
@over(
    runs(XLA, "bfloat16", FEW[:1]),
    runs(MOSAIC_GPU, "bfloat16", [KERNEL_CASES[1]]),
    runs(MOSAIC_TPU, "bfloat16", TPU_FEW[:1]),
)
def test_gradients_reach_the_rows(way, dtype, case, stored):
    arrays, gate, up = prepared(stored, case, dtype)
    want = judge_gated(case, arrays)
    plan = planned(case)
    dx, d_scale = way.call(gradients, plan, arrays.x, arrays.scale, gate, up, arrays.d_out)
    assert_close(dx, want.dx, TOLERANCE[dtype])
    assert_close(d_scale, want.d_scale, TOLERANCE[dtype])


def test_no_gradient_reaches_the_matrices():
    w = quantize_matrix(jnp.ones((1, 4, 2)), "fp8")

    def loss(scale):
        matrix = QuantizedMatrix(w.qvalue, scale, "fp8")
        return grouped_matmul(jnp.ones((4, 4)), matrix, jnp.zeros(1, jnp.int32)).sum()

    np.testing.assert_array_equal(jax.grad(loss)(w.scale), 0)
