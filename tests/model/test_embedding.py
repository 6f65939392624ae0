"""Logits of one row by a kernel, where XLA takes twice as long, are those of XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import Llama4Config
from jaxmoe.mesh import MeshConfig
from jaxmoe.model import embedding
from jaxmoe.model.embedding import unembed
from pallas_kernels.step import matmul_few
from tests.pallas_kernels.hopper import INTERPRET, ON_GPU

CONFIG = Llama4Config(
    vocab_size=120, hidden_size=128, intermediate_size=64, intermediate_size_mlp=64,
    num_attention_heads=2, num_key_value_heads=1, head_dim=64, num_local_experts=2, layers=(),
)  # fmt: skip


def drawn(rows, V=128):
    rng = np.random.default_rng(rows)
    hidden, head = (rng.standard_normal(shape) for shape in ((rows, 128), (128, V)))
    return jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)


def check(rows, mesh):
    hidden, head = drawn(rows)
    with jax.set_mesh(mesh):
        got = jax.jit(functools.partial(unembed, CONFIG))({"lm_head": head}, hidden)
    want = np.asarray(hidden, np.float32) @ np.asarray(head, np.float32)[:, :120]
    assert got.dtype == jnp.float32 and got.shape == (rows, 120)
    want = np.asarray(jnp.asarray(want, jnp.bfloat16), np.float32)
    rounding = 2**-7 if ON_GPU else 0  # another order of sums may round the other way
    np.testing.assert_allclose(got, want, rtol=rounding, atol=0)


@pytest.mark.hopper
def test_logits_of_one_row(monkeypatch):
    """Catches padded rows in the result, and a rounding that is left out."""
    monkeypatch.setattr(embedding, "why_not_hopper", lambda: None)
    monkeypatch.setattr(embedding, "matmul_few", functools.partial(matmul_few, interpret=INTERPRET))
    check(1, MeshConfig().make(jax.devices()[:1]))


@pytest.mark.parametrize("rows", [1, 2])
def test_logits_on_a_mesh(monkeypatch, rows):
    """Catches parts of the vocabulary or groups of rows that change places."""

    def multiply(x, weights):
        out = jnp.dot(x, *weights, preferred_element_type=jnp.float32)
        return jnp.pad(out, ((0, -len(x) % 8), (0, 0)), constant_values=jnp.nan)[None]

    monkeypatch.setattr(embedding, "why_not_hopper", lambda: None)
    monkeypatch.setattr(embedding, "matmul_few", multiply)
    check(rows, MeshConfig.parse("data=2,tensor=2").make(jax.devices()[:4]))


def test_gradients_are_those_of_xla(monkeypatch):
    hidden, head = drawn(1)

    def gradients():
        def loss(hidden, head):
            return (unembed(CONFIG, {"lm_head": head}, hidden) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(hidden, head)

    want = gradients()
    monkeypatch.setattr(embedding, "why_not_hopper", lambda: None)
    monkeypatch.setattr(embedding, "matmul_few", functools.partial(matmul_few, interpret=INTERPRET))
    for got, wanted in zip(gradients(), want, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("shape", "V", "served"),
    [((1,), 202048, True), ((2,), 128, False), ((1,), 120, False),
     ((1, 2), 128, False)],
)  # fmt: skip
def test_who_multiplies(monkeypatch, shape, V, served):
    monkeypatch.setattr(embedding, "why_not_hopper", lambda: None)
    hidden = jax.ShapeDtypeStruct((*shape, 128), jnp.bfloat16)
    why = embedding._why_not_by_kernel(hidden, jax.ShapeDtypeStruct((128, V), jnp.bfloat16))
    assert (why is None) == served
