"""Kernels of a decode step at Scout's and Maverick's sizes, compiled for an absent H100."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.compile.absent import absent_h100s, compiler_options, lower_for
from pallas_kernels.compile.assembler import assembler_reports
from pallas_kernels.quantized import in_pairs, quantize
from pallas_kernels.step import (
    HeadPlan,
    add_rms_norm,
    busy_experts,
    experts_down,
    experts_gate_up,
    matmul_few,
    write_heads,
)
from pallas_kernels.step.heads import _rows_tile

pytestmark = pytest.mark.absent_gpu

D, F, HEADS, d = 5120, 1024, 5, 128  # a device's share of tensor=8


def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def floats(*shape):
    return shaped(*shape, dtype=jnp.float32)


def integers(*shape):
    return shaped(*shape, dtype=jnp.int32)


def check(function, *arguments, kernels):
    """Asserts the number of kernels, no spilled registers and no compiler warnings."""
    reports = assembler_reports(
        lower_for(*absent_h100s(1), function, *arguments), compiler_options()
    )
    assert [report.name.removesuffix("_mosaic_gpu_kernel") for report in reports] == kernels
    for report in reports:
        assert (report.spill_stores, report.spill_loads, report.warnings) == (0, 0, ())


@pytest.mark.parametrize("tokens", [1, 20, 64])
def test_norms_and_products(tokens):
    def run(x, more, weight, *weights):
        _, normed = add_rms_norm(x, more, weight, 1e-5)
        return matmul_few(normed, weights, parts=None)

    arguments = shaped(tokens, D), floats(64, D), shaped(D)
    weights = [shaped(D, heads * d) for heads in (HEADS, 1, 1)]
    check(run, *arguments, *weights, kernels=["add_rms_norm", "matmul_few"])


@pytest.mark.parametrize("experts", [8, 16, 24, 32, 64, 128])
def test_routers(experts):
    """Routers with these numbers of experts compile; `decode_step` refuses others, as TMA does."""

    def run(x, router):
        return matmul_few(x, (router,), parts=None)

    check(run, shaped(8, D), shaped(D, experts), kernels=["matmul_few"])


@pytest.mark.parametrize("format", [None, "int8", "fp8", "int4"])
def test_a_tokens_keys_begin_where_tma_copies_from(format):
    """Rows begin at multiples of 128 bytes, which only hardware would enforce."""
    pages = shaped(2, 1, 64, d)
    stored = jax.eval_shape(lambda x: quantize(x, format).qvalue, pages) if format else pages
    rows = _rows_tile(stored)
    assert rows.shape[1] * rows.dtype.itemsize % 128 == 0
    assert rows.shape[1] >= stored.shape[3]


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("format", [None, "int8", "fp8", "int4"])
def test_heads(format, local):
    pages = shaped(100, 1, 64, d)
    cache = jax.eval_shape(lambda x: in_pairs(quantize(x, format)), pages) if format else pages
    turned = HeadPlan(floats(64, d), floats(64, d), None, integers(20))
    plan = turned if local else HeadPlan(None, None, floats(64), integers(20))
    run = functools.partial(write_heads, heads=HEADS, norm_eps=1e-5 if local else None)
    qkv = floats(4, 24, (HEADS + 2) * d)
    check(lambda *a: run(*a), qkv, plan, cache, cache, kernels=["write_heads"])


@pytest.mark.parametrize(("tokens", "experts"), [(1, 16), (64, 16), (64, 128), (64, 0)])
def test_experts(tokens, experts):
    def run(x, gate, down, shared_gate, shared_down, expert, router_weight):
        routed = (gate, gate) if experts else None
        busy = busy_experts(expert, experts) if experts else jnp.zeros(1, jnp.int32)
        hidden = experts_gate_up(x, routed, (shared_gate, shared_gate), expert, router_weight, busy)
        return experts_down(hidden, down, shared_down, expert, busy)

    gate, down = (shaped(experts, *s) if experts else None for s in ((D, F), (F, D)))
    arguments = shaped(tokens, D), gate, down, shaped(D, F), shaped(F, D)
    of_tokens = integers(tokens), floats(tokens)
    check(run, *arguments, *of_tokens, kernels=["experts_gate_up", "experts_down"])
