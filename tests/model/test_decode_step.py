"""A decode step in few launches: the numbers of `decoder_layer`, in the interpreter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.config import LayerKind, Llama4Config
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.decode_step import why_not_fused
from jaxmoe.model.kernels import Kernels
from jaxmoe.model.kv_cache import init_cache, round_capacity
from jaxmoe.model.params import abstract_params, init_params, quantize_params
from jaxmoe.model.transformer import forward, unembed
from pallas_kernels.quantized import unpaired
from tests.pallas_kernels import hopper, tpu
from tests.pallas_kernels.attention.cases import assert_close
from tests.pallas_kernels.hopper import INTERPRET, ON_GPU
from tests.tiers import slow

LAYERS = (LayerKind("local", "moe"), LayerKind("local", "dense"), LayerKind("global", "moe"))
SMALL = Llama4Config(
    vocab_size=64, hidden_size=512, intermediate_size=64, intermediate_size_mlp=128,
    num_attention_heads=2, num_key_value_heads=1, head_dim=128, num_local_experts=8,
    layers=LAYERS, attention_chunk_size=64, floor_scale=16, rms_norm_eps=1e-5,
)  # fmt: skip
TPU_SMALL = dataclasses.replace(
    SMALL, intermediate_size=256, intermediate_size_mlp=256, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
INTERPRETED = Kernels(interpret=INTERPRET)
PREFIX = 70  # tokens: the newest are a chunk behind the first


@functools.cache
def parameters(config, format=None):
    params = init_params(config, nnx.Rngs(0).params(), jnp.bfloat16)
    return params if format is None else quantize_params(config, params, format)


def filled(config, rows, kv, params=None):
    """A cache after a prefix of each row's own length, and the next token with its coordinates."""
    rng = np.random.default_rng(rows)
    tokens = rng.integers(0, config.vocab_size, (rows, PREFIX), np.int32)
    lengths = PREFIX - 3 * np.arange(rows, dtype=np.int32)
    positions = np.broadcast_to(np.arange(PREFIX, dtype=np.int32), tokens.shape)
    segments = (positions < lengths[:, None]).astype(np.int32)
    cache = init_cache(config, rows, round_capacity(128), kv)
    run = jax.jit(functools.partial(forward, config))
    params = parameters(config) if params is None else params
    cache = run(params, tokens, positions, segments, cache).cache
    new = (tokens[:, :1] + 1) % config.vocab_size  # not the first, which rotates alike
    return cache, (new, lengths[:, None], np.ones((rows, 1), np.int32))


def step(config, cache, new, format=None, params=None, **options):
    params = parameters(config, format) if params is None else params

    def run(params, cache, *new):
        states = tuple(range(len(config.layers) + 1))
        out = forward(config, params, *new, cache, states=states, **options)
        return unembed(config, params, out.hidden[:, -1]), out

    return jax.block_until_ready(jax.jit(run)(params, cache, *new))


def fused(config, cache, new, hardware=hopper, format=None, params=None):
    kernels = Kernels(interpret=hardware.INTERPRET)
    with hardware.no_races():
        return step(config, cache, new, format, params, kernels=kernels)


def slots_that_differ(one, other):
    """Where two layers' pages [P, K, t] differ in any element of a token's keys or values."""
    differs = 0
    one, other = (jax.tree.leaves([*map(unpaired, layer)]) for layer in (one, other))
    for x, y in zip(one, other, strict=True):
        differ = as_float(x) != as_float(y)
        differs |= differ.any(-1) if differ.ndim == 4 else differ
    return differs


def as_float(x):
    return np.asarray(x).astype(np.float32)


@pytest.mark.parametrize(
    ("hardware", "rows", "kv", "changes", "format"),
    [
        pytest.param(
            hopper, 1, "bf16", {"use_qk_norm": False, "layers": LAYERS[::2]}, None,
            marks=pytest.mark.hopper,
        ),
        pytest.param(
            hopper, 3, "int8", {"layers": LAYERS[1:]}, None,
            marks=[pytest.mark.hopper, pytest.mark.slow],
        ),
        # One layer: a rounding of its output would move the next one's keys by a step of int4.
        (tpu, 2, "int4", {"layers": LAYERS[2:]}, None),
        *slow(
            # Some of the layers: each takes 8 s to compile. More of them: on a mesh, below.
            (tpu, 1, "bf16", {"use_qk_norm": False, "layers": LAYERS[::2]}, None),
            (tpu, 2, "int8", {"layers": LAYERS[:2]}, "int4"),
            (tpu, 3, "int8", {"layers": LAYERS[2:]}, "int8"),
        ),
    ],
)  # fmt: skip
def test_logits_and_cache_are_those_of_the_layers(hardware, rows, kv, changes, format):
    """Catches any part left out: rotation, norm, temperature, score, shared expert, a place."""
    config = dataclasses.replace(SMALL if hardware is hopper else TPU_SMALL, **changes)
    cache, new = filled(config, rows, kv)
    want, plain = step(config, cache, new, format, fused=False)
    got, kernels = fused(config, cache, new, hardware, format)
    assert_close(as_float(got), as_float(want), 0.02)
    assert_close(as_float(kernels.states), as_float(plain.states), 0.02)
    for mine, theirs, before in zip(
        *(x.layers for x in (kernels.cache, plain.cache, cache)), strict=True
    ):
        written = slots_that_differ(theirs, before)
        assert written.sum() == rows * config.num_key_value_heads
        np.testing.assert_array_equal(slots_that_differ(mine, before), written)
    for mine, theirs in zip(
        jax.tree.leaves(kernels.cache[1:]), jax.tree.leaves(plain.cache[1:]), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    first = kernels.cache.layers[0], plain.cache.layers[0]
    for mine, theirs in zip(*map(jax.tree.leaves, first), strict=True):
        # On a GPU XLA may fuse a product and a sum of the rotation, without rounding in between.
        allowed = (mine.dtype == jnp.int8 or 0.01 * np.abs(as_float(theirs)).max()) if ON_GPU else 0
        np.testing.assert_allclose(as_float(mine), as_float(theirs), rtol=0, atol=allowed)
    stats = zip(kernels.router_stats, plain.router_stats, strict=True)
    assert all((a.assignments == b.assignments).all() and a.dropped == 0 for a, b in stats)


@pytest.mark.slow
@pytest.mark.hopper
def test_padding_writes_nothing_and_rows_stay_apart():
    """One row is padding, one is NaN; the third is bit-equal to a step in which both are sound."""
    config = dataclasses.replace(SMALL, layers=LAYERS[1:])  # a feed-forward network of each kind
    cache, (tokens, positions, _) = filled(config, 3, "int8")
    segments = np.array([[1], [0], [1]], np.int32)
    tokens[1], tokens[2] = tokens[0], (tokens[0] + 1) % config.vocab_size
    params = parameters(config)
    sick = {**params, "embed": params["embed"].at[tokens[0, 0]].set(jnp.nan)}

    run = jax.jit(lambda *inputs: forward(config, *inputs, kernels=INTERPRETED).hidden)
    sound, with_nan = (
        as_float(run(params, tokens, positions, segments, cache)) for params in (params, sick)
    )
    assert np.isfinite(sound[[0, 2]]).all()
    assert np.isnan(with_nan[0]).all()
    np.testing.assert_array_equal(sound[2], with_nan[2])


def why_not(config=SMALL, rows=1, tokens=1, dtype=jnp.bfloat16, params=None, mesh=None):
    x = jax.ShapeDtypeStruct((rows, tokens, config.hidden_size), dtype)
    params = parameters(SMALL) if params is None else params
    with jax.set_mesh(mesh) if mesh is not None else jax.set_mesh(None):
        return why_not_fused(config, params, x, init_cache(config, 1, 512), INTERPRET)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tokens": 2}, "one new token a row"),
        ({"config": dataclasses.replace(SMALL, selection_bias=True)}, "without a selection bias"),
        ({"rows": 65}, "up to 64 tokens, not 65"),
        ({"dtype": jnp.float32}, "bfloat16, not float32"),
        ({"config": dataclasses.replace(SMALL, attention_chunk_size=48)}, "multiples of 64 tokens"),
        ({"config": dataclasses.replace(SMALL, num_experts_per_tok=2)}, "and one expert"),
        ({"config": dataclasses.replace(SMALL, num_local_experts=48)}, "64 experts, not 48"),
        ({"config": dataclasses.replace(SMALL, num_local_experts=4)}, "64 experts, not 4"),
        ({"config": dataclasses.replace(SMALL, intermediate_size=96)}, "multiples of 64"),
        ({"config": dataclasses.replace(SMALL, hidden_size=576)}, "multiples of 512"),
    ],
)
def test_what_it_does_not_serve(options, why):
    assert why in why_not(**options)
    assert why_not() is None


def test_quantized_matrices_are_not_served():
    assert "not quantized" in why_not(params=quantize_params(SMALL, parameters(SMALL), "int8"))


def test_tokens_that_travel_to_their_experts_are_not_served():
    mesh = MeshConfig.parse("expert=2").make(jax.devices()[:2])
    assert "need not travel" in why_not(rows=2, mesh=mesh)
    assert why_not(rows=1, mesh=mesh) is None


@pytest.mark.parametrize(
    ("mesh", "rows", "layers"),
    [
        ("data=2", 2, LAYERS[2:]),
        *slow(("tensor=2,sequence=2", 2, LAYERS[1:]), ("expert=2,tensor=2", 1, LAYERS[:1])),
    ],
)
def test_tpu_kernels_on_a_mesh(mesh, rows, layers):
    """Heads, keys, experts and rows on devices of their own: the layers' numbers without a mesh."""
    config = dataclasses.replace(TPU_SMALL, layers=layers)
    cache, new = filled(config, rows, "int8")
    want, plain = step(config, cache, new, fused=False)
    mesh = MeshConfig.parse(mesh).make(jax.devices()[: 4 if "," in mesh else 2])
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda x: x.sharding, abstract_params(config, mesh, jnp.bfloat16))
        params = jax.device_put(parameters(config), places)
        cache, new = filled(config, rows, "int8", params)
        got, kernels = fused(config, cache, new, tpu, params=params)
    assert_close(as_float(got), as_float(want), 0.02)
    assert_close(as_float(kernels.states), as_float(plain.states), 0.02)
