"""Kernels of a decode step agree with float64 or the layers' functions, in the interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.model.kv_cache.layer import write
from jaxmoe.model.layers import rms_norm, rms_normalize, rotate
from pallas_kernels.compile.absent import absent_h100s, lower_for
from pallas_kernels.quantized import dequantize_matrix, in_pairs, quantize, quantize_matrix
from pallas_kernels.step import (
    HeadPlan,
    add_rms_norm,
    busy_experts,
    experts_down,
    experts_gate_up,
    matmul_few,
    write_heads,
)
from pallas_kernels.step.heads import swap_pairs
from tests.pallas_kernels import hopper, tpu
from tests.pallas_kernels.attention.cases import assert_close

HARDWARE = {"hopper": hopper, "tpu": tpu}
PAGES, PAGE, d = 6, 64, 128


def draw(seed, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.fixture(params=[pytest.param("hopper", marks=pytest.mark.hopper), "tpu"])
def interpreted(request):
    """Runs a function with the parameters of an interpreter, and finds no race."""
    hardware = HARDWARE[request.param]

    def run(function, *arguments):
        run = jax.jit(functools.partial(function, interpret=hardware.INTERPRET))
        with hardware.no_races():
            return jax.block_until_ready(run(*arguments))

    run.hardware = request.param
    return run


WIDTHS = {"hopper": (128, 64, 32), "tpu": (256, 128, 128)}  # of matrices side by side
PARTS = {"hopper": 2, "tpu": 1}


def exact(x):
    return np.asarray(x).astype(np.float64)


def bad_first_row(x, bad):
    return x.at[0].set(bad)


@pytest.mark.parametrize("tokens", [1, 5, 8, 20, 64])
def test_matmul(interpreted, tokens):
    """Multiplies by three matrices, on Hopper one narrower than a tile; catches lost tokens."""
    widths = WIDTHS[interpreted.hardware]
    x, weights = draw(0, tokens, 256), [draw(i, 256, n) for i, n in enumerate(widths, 1)]
    out = interpreted(lambda x, *w, **run: matmul_few(x, w, parts=2, **run), x, *weights)
    parts = PARTS[interpreted.hardware]
    assert out.shape == (parts, -(-tokens // 8) * 8, sum(widths))
    want = np.concatenate([exact(x) @ exact(w) for w in weights], 1)
    assert_close(exact(out).sum(0)[:tokens], want, 1e-5)


@pytest.mark.absent_gpu
@pytest.mark.parametrize("widths", [(16,), (128, 64, 32), (202048,)])
def test_widths_lower_for_hopper(widths):
    """Catches matrices that TMA does not cut into tiles, which the interpreter does."""
    (h100,) = absent_h100s(1)
    shapes = (3, 256), *((256, width) for width in widths)
    x, *weights = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    lower_for(h100, lambda x, *weights: matmul_few(x, weights), x, *weights)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_token_reaches_no_other_in_products(interpreted, bad):
    x, w = draw(0, 3, 128), draw(1, 128, 128)
    run = functools.partial(interpreted, lambda x, w, **run: matmul_few(x, (w,), **run)[0])
    np.testing.assert_array_equal(run(bad_first_row(x, bad), w)[1:3], run(x, w)[1:3])


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])
def test_norm(interpreted, tokens, adds):
    """Results are bit-equal to the layers', which round at the same points; one token is NaN."""
    x, weight = draw(0, tokens, 512), draw(1, 512)
    more = draw(2, 8, 512, dtype=jnp.float32) if adds else None
    x = x if tokens == 1 else bad_first_row(x, np.nan)
    function = functools.partial(add_rms_norm, eps=1e-5)
    total, normed = interpreted(
        lambda x, more, w, **run: function(x, more, w, **run), x, more, weight
    )
    want = x + more[:tokens].astype(x.dtype) if adds else x
    np.testing.assert_array_equal(exact(total), exact(want))
    np.testing.assert_array_equal(exact(normed), exact(rms_norm(want, weight, 1e-5)))
    assert np.isnan(exact(normed)).any() == (tokens > 1)


def empty(format, kv_heads):
    zeros = jnp.zeros((PAGES, kv_heads, PAGE, d), jnp.bfloat16)
    return in_pairs(quantize(zeros, format)) if format else zeros


def head_plan(tokens, local, place):
    """A HeadPlan of random angles or temperatures and the given slots."""
    pad = functools.partial(np.pad, pad_width=((0, 64 - tokens), (0, 0)))
    angle = np.asarray(draw(5, tokens, d // 2, dtype=jnp.float32)) * 3
    cos, sin = (np.repeat(f(angle), 2, -1) for f in (np.cos, np.sin))
    temperature = 1 + np.arange(tokens, dtype=np.float32) / 7
    padded = np.pad(temperature, (0, 64 - tokens))
    plan = (
        HeadPlan(pad(cos), pad(sin), None, place) if local else HeadPlan(None, None, padded, place)
    )
    return plan, angle, temperature


@pytest.mark.parametrize(
    ("format", "local", "norm_eps"),
    [(None, True, 1e-5), (None, False, None), ("int8", True, None), ("int8", False, None),
     ("fp8", True, 1e-5), ("int4", False, None)],
)  # fmt: skip
def test_heads(interpreted, format, local, norm_eps):
    """Queries and cache are bit-equal to those of the layers' functions and of `write`."""
    T, H, K = 3, 4, 2
    place = np.array([70, PAGES * PAGE, 3], np.int32)  # the second token is not written
    plan, angle, temperature = head_plan(T, local, place)
    qkv, cache = draw(0, 2, 8, (H + 2 * K) * d, dtype=jnp.float32), empty(format, K)
    function = functools.partial(write_heads, heads=H, norm_eps=norm_eps)
    q, k, v = interpreted(lambda *a, **run: function(*a, **run), qkv, plan, cache, cache)

    x = (qkv[0] + qkv[1])[:T].astype(jnp.bfloat16).reshape(1, T, -1, d)
    want_q, want_k, want_v = x[:, :, :H], x[:, :, H : H + K], x[:, :, H + K :]
    if local:
        turned = (rotate(z, jnp.cos(angle)[None], jnp.sin(angle)[None]) for z in (want_q, want_k))
        want_q, want_k = (z if norm_eps is None else rms_normalize(z, norm_eps) for z in turned)
    else:
        want_q = (want_q.astype(jnp.float32) * temperature[None, :, None, None]).astype(x.dtype)
    want = [write(cache, z.swapaxes(1, 2), jnp.asarray(place)[None]) for z in (want_k, want_v)]
    for got, expected in zip(
        jax.tree.leaves((q, k, v)), jax.tree.leaves((want_q[0], *want)), strict=True
    ):
        np.testing.assert_array_equal(exact(got), exact(expected))


def test_swapped_pairs_are_exact():
    x = draw(0, 2, 8)
    want = jnp.stack([-x[:, 1::2], x[:, ::2]], -1).reshape(x.shape)
    np.testing.assert_array_equal(exact(x @ swap_pairs(8)), exact(want))


def silu(x):
    return x / (1 + np.exp(-x))


def feed_forward(x, routed, shared, expert, router_weight, shared_here=True, **run):
    """The experts' results; `routed` and `shared` are (gate, up, down)."""
    busy = jnp.zeros(1, jnp.int32)
    gate_up, down = None, None
    if routed:
        busy = busy_experts(expert, routed[2].shape[0], shared_here)
        gate_up, down = routed[:2], routed[2]
    hidden = experts_gate_up(x, gate_up, shared[:2], expert, router_weight, busy, **run)
    return experts_down(hidden, down, shared[2], expert, busy, **run)


def matrices(seed, *outer):
    D, F = 256, 128
    shapes = (D, F), (D, F), (F, D)
    return tuple(draw(seed + i, *outer, *s) * s[0] ** -0.5 for i, s in enumerate(shapes))


def gated(x, weights, router_weight=1.0):
    gate, up, down = map(exact, weights)
    hidden = silu(router_weight * (x @ gate)) * (router_weight * (x @ up))
    return exact(jnp.asarray(hidden, jnp.bfloat16)) @ down


@pytest.mark.parametrize(
    ("experts", "expert", "shared_here"),
    [
        (4, [2], True),  # fewer tokens than experts
        (4, [3, 4, 3], True),  # one token has no expert here
        (4, [2, 1, -1, 0, 0, 2, 0, 2, 3], True),  # more tokens than experts
        (4, [1, 1], False),  # another device has the shared expert
        (4, [5, -1], False),  # and all others
        (0, [0, 0, 0], True),  # a dense layer
    ],
)
def test_experts(interpreted, experts, expert, shared_here):
    """Each token gets its expert's and the shared expert's result, and no other's."""
    T = len(expert)
    x, router_weight = draw(0, T, 256), np.linspace(0.2, 0.9, T, dtype=np.float32)
    routed, shared = matrices(10, experts) if experts else None, matrices(20)
    function = functools.partial(feed_forward, shared_here=shared_here)
    expert = np.array(expert, np.int32)
    got = interpreted(
        lambda *a, **run: function(*a, **run), x, routed, shared, expert, router_weight
    )
    want = gated(exact(x), shared) if shared_here else np.zeros((T, 256))
    for t, e in enumerate(expert):
        if 0 <= e < experts:
            want[t] += gated(exact(x[t]), [w[e] for w in routed], router_weight[t])
    assert_close(exact(got)[:T], want, 1e-3)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_quantized_matrices(format):
    """On TPUs, of several tiles; int4 has an odd number of groups in `down`, of 384 inputs."""
    run = functools.partial(jax.jit, static_argnames="interpret")
    x, heads = draw(0, 3, 512), [quantize_matrix(draw(i, 512, 256), format) for i in (1, 2)]
    made = [draw(3, *s) * 0.05 for s in ((512, 384), (512, 384), (384, 512))]
    shared = tuple(quantize_matrix(w, format) for w in made)
    routed = tuple(quantize_matrix(jnp.stack([w[::-1], -w]), format) for w in made)
    expert, weight = np.array([1, 0, 2], np.int32), np.array([0.5, 0.7, 1], np.float32)
    with tpu.no_races():
        qkv = run(lambda *a, interpret: matmul_few(x, a, interpret=interpret))(
            *heads, interpret=tpu.INTERPRET
        )
        out = run(feed_forward)(x, routed, shared, expert, weight, interpret=tpu.INTERPRET)
    want = np.concatenate([exact(x) @ exact(dequantize_matrix(w)) for w in heads], 1)
    assert_close(exact(qkv[0])[:3], want, 1e-5)
    shared, routed = ([exact(dequantize_matrix(w)) for w in kind] for kind in (shared, routed))
    want = gated(exact(x), shared)
    for t, e in enumerate(expert[:2]):
        want[t] += gated(exact(x[t]), [w[e] for w in routed], weight[t])
    assert_close(exact(out)[:3], want, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["token", "expert"])
def test_what_is_bad_in_the_experts_stays_there(interpreted, where, bad):
    """NaN in a token or in an expert's matrices leaves tokens of other experts bit-equal."""
    x, router_weight, expert = (
        draw(0, 3, 256),
        np.ones(3, np.float32),
        np.array([1, 0, 2], np.int32),
    )
    routed, shared = matrices(10, 4), matrices(20)
    want = interpreted(feed_forward, x, routed, shared, expert, router_weight)
    if where == "token":
        x = bad_first_row(x, bad)
    else:
        routed = tuple(w.at[1].set(bad) for w in routed)
    got = interpreted(feed_forward, x, routed, shared, expert, router_weight)
    np.testing.assert_array_equal(got[1:3], want[1:3])
    assert not np.isfinite(got[0]).any()


@pytest.mark.parametrize(
    ("expert", "num_experts", "busy"),
    [
        ([3], 4, [3, 0]),
        ([3, 3, 1], 4, [3, 4, 1, 0]),
        ([4, -1], 4, [4, 4, 0]),
        ([2, 2, 0, 2, 9], 4, [0, 4, 2, 4, 0]),
    ],
)
def test_busy_experts(expert, num_experts, busy):
    assert busy_experts(jnp.array(expert), num_experts).tolist() == busy
    assert busy_experts(jnp.array(expert), num_experts, False).tolist() == [
        *busy[:-1],
        num_experts,
    ]
