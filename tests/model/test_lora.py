"""Adapters beside matrices: merged and unmerged alike, on any mesh, over any base."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmoe.compilation import KEEP_ROUNDINGS
from jaxmoe.errors import UserError
from jaxmoe.eval.logits import token_logits
from jaxmoe.mesh import MeshConfig
from jaxmoe.model import adapters
from jaxmoe.model.decode_step import why_not_fused
from jaxmoe.model.kv_cache import init_cache
from jaxmoe.model.lora import (
    LoraMatrix,
    experts_gated,
    experts_matmul,
    is_lora,
    without_adapters,
)
from jaxmoe.model.params import quantize_params
from jaxmoe.train.loss import next_token_loss
from jaxmoe.train.partition import join, split
from pallas_kernels.quantized import QuantizedMatrix, dequantize_matrix
from tests import tiny
from tests.conftest import load_tiny, one_device

LENGTH = 24
MESHES = [  # over twenty steps: tests/train/test_adapters.py
    "fsdp=2,expert=2,tensor=2",
    "data=2,expert=2,sequence=2",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A dense local layer and a MoE global one."""
    config = tiny.maverick_like(num_hidden_layers=2, no_rope_layer_interval=2, num_local_experts=4)
    return load_tiny(tmp_path_factory.mktemp("lora"), config, tiny.random_tensors(config, 7))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 120, (4, LENGTH), np.int32)


def with_random_adapters(config, params, mesh=None):
    """Adapters of rank 3 beside every matrix, whose `b` is not zero."""
    mesh = mesh or one_device()
    ranks = dict.fromkeys(adapters.adaptable(config), 3)
    abstract = adapters.abstract_adapters(config, mesh, ranks)
    first, keys = adapters.init_adapters(abstract, jax.random.key(1)), {}
    for i, (name, (a, b)) in enumerate(first.items()):
        drawn = 0.3 * np.random.default_rng(i).standard_normal(b.shape, np.float32)
        keys[name] = adapters.Adapter(a, jax.device_put(drawn, b.sharding), 0.5)
    return adapters.with_adapters(config, params, keys)


@pytest.fixture(scope="module")
def adapted(model):
    return with_random_adapters(model.config, model.params)


def test_new_adapters_change_nothing_and_all_matrices_take_one(model, tokens):
    ranks = dict.fromkeys(adapters.adaptable(model.config), 2)
    first = adapters.init_adapters(
        adapters.abstract_adapters(model.config, one_device(), ranks), jax.random.key(0)
    )
    new = {name: adapters.Adapter(a, b, 2.0) for name, (a, b) in first.items()}
    params = adapters.with_adapters(model.config, model.params, new)
    found = sum(map(is_lora, jax.tree.leaves(params, is_leaf=is_lora)))
    assert found == 2 * 4 + 3 + 1 + 3 + 3  # attention, dense, router, shared, routed
    plain = token_logits(model.config, model.params, tokens)
    np.testing.assert_array_equal(token_logits(model.config, params, tokens), plain)
    bound = float(abs(first["layers.0.attention.q"][0]).max())
    assert 0.9 < bound * model.config.hidden_size**0.5 <= 1


def test_merged_equals_unmerged(model, adapted, tokens):
    plain = token_logits(model.config, model.params, tokens)
    beside = token_logits(model.config, adapted, tokens)
    merged = adapters.merge_adapters(model.config, adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(model.params)
    assert abs(beside - plain).max() > 0.1
    assert abs(token_logits(model.config, merged, tokens) - beside).max() < 1e-5


def test_cached_steps_run_with_adapters(model, adapted, tokens):
    whole = token_logits(model.config, adapted, tokens)
    stepped = token_logits(model.config, adapted, tokens, prefill_chunk=16, decode_from=20)
    assert abs(stepped - whole).max() < 1e-5


@functools.partial(jax.jit, static_argnums=0, compiler_options=KEEP_ROUNDINGS)
def value_and_grad(config, trained, frozen, tokens):
    loss, batch = next_token_loss(0.01), (tokens, jnp.ones_like(tokens))
    of_trained = lambda trained: loss(config, join(trained, frozen), batch)[0]  # noqa: E731
    return jax.value_and_grad(of_trained)(trained)


def loss_and_gradients(model, params, tokens):
    """The loss and the gradients of `a` and `b`, whatever the base is stored in."""
    parts = split(params, lambda name: name.endswith((".a", ".b")))
    return value_and_grad(model.config, *parts, tokens)


@pytest.fixture(scope="module")
def on_one_device(model, adapted, tokens):
    return loss_and_gradients(model, adapted, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_losses_and_gradients_on_any_mesh(model, tokens, on_one_device, mesh):
    sizes = MeshConfig.parse(mesh)
    mesh = sizes.make(jax.devices()[: int(np.prod(dataclasses.astuple(sizes)))])
    params = with_random_adapters(model.config, model.on(mesh), mesh)
    with jax.set_mesh(mesh):
        value, gradients = loss_and_gradients(model, params, tokens)
        merged = adapters.merge_adapters(model.config, params)
    np.testing.assert_allclose(value, on_one_device[0], rtol=1e-5)
    close = functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4)
    jax.tree.map(close, gradients, on_one_device[1])
    placed = lambda x: x.sharding  # noqa: E731
    assert jax.tree.map(placed, merged) == jax.tree.map(placed, without_adapters(params))


def test_every_adapter_has_a_gradient(on_one_device):
    leaves = jax.tree.leaves(on_one_device[1])
    assert len(leaves) == 2 * 18 - 1 and all(float(abs(x).max()) > 1e-6 for x in leaves)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_qlora_equals_lora_on_the_widened_base(model, adapted, tokens, format):
    quantized = quantize_params(model.config, adapted, format)

    def widened(w):
        return dequantize_matrix(w) if isinstance(w, QuantizedMatrix) else w

    def widened_lora(w, plain):
        shape = plain.base.shape if isinstance(plain, LoraMatrix) else plain.shape
        if not isinstance(w, LoraMatrix):
            return widened(w).reshape(shape)
        return dataclasses.replace(w, base=widened(w.base).reshape(shape))

    stored = lambda x: isinstance(x, LoraMatrix | QuantizedMatrix)  # noqa: E731
    wide = jax.tree.map(widened_lora, quantized, adapted, is_leaf=stored)
    value, gradients = loss_and_gradients(model, quantized, tokens)
    wanted, wanted_gradients = loss_and_gradients(model, wide, tokens)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4)
    jax.tree.map(close, jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients))


def test_merging_into_a_quantized_base_is_asked_for(model, adapted):
    quantized = quantize_params(model.config, adapted, "int8")
    with pytest.raises(UserError, match=r"attention\.k is in int8.*requantize"):
        adapters.merge_adapters(model.config, quantized)
    merged = adapters.merge_adapters(model.config, quantized, requantize=True)
    before, after = (p["layers"][0]["attention"]["q"] for p in (quantized, merged))
    wanted = dequantize_matrix(before.base) + 0.5 * before.a @ before.b
    assert (abs(dequantize_matrix(after) - wanted) <= 0.5001 * after.scale).all()


def test_fused_steps_refuse_adapters(model, adapted):
    cache = init_cache(model.config, 2, 128)
    x = jax.ShapeDtypeStruct((2, 1, model.config.hidden_size), jnp.float32)
    assert "merge_adapters" in str(why_not_fused(model.config, adapted, x, cache))


@pytest.mark.parametrize("rank", [3, 256])
def test_tpu_kernels_serve_any_rank(rank):
    """A rank that no tile divides is filled up with zeros."""
    rng = np.random.default_rng(rank)
    rows, groups = jnp.array(rng.standard_normal((16, 256), np.float32)), jnp.array([1, 2])

    def matrix(a):
        base, b = (rng.standard_normal((2, n, 256), np.float32) / 16 for n in (256, rank))
        return LoraMatrix(jnp.array(base), a, jnp.array(b), 0.5)

    a = jnp.array(rng.standard_normal((2, 256, rank), np.float32) / 16)
    w, up = matrix(a), matrix(None)
    scale = jnp.array(rng.standard_normal(16, np.float32))
    for kernels in ({}, {"interpret": pltpu.InterpretParams()}):
        out = experts_matmul(rows, w, groups, **kernels)
        gated = experts_gated(rows, w, up, groups, scale, **kernels)
        g, u = (rows[:8] @ (z.base + 0.5 * a @ z.b)[1] for z in (w, up))
        np.testing.assert_allclose(out[:8], g, atol=1e-5)
        s = scale[:8, None]
        np.testing.assert_allclose(gated[:8], jax.nn.silu(s * g) * (s * u), atol=1e-5)
