"""Logits of few rows by the kernel that reads the matrix at memory speed are those of XLA."""

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
from tests.pallas_kernels.hopper import INTERPRET

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
    np.testing.assert_array_equal(got, jnp.asarray(want, jnp.bfloat16).astype(jnp.float32))


@pytest.mark.hopper
@pytest.mark.parametrize("rows", [2, 10])
def test_logits_of_few_rows(monkeypatch, rows):
    """Catches rows that are mixed up, and a rounding that is left out."""
    monkeypatch.setattr(embedding, "why_not_hopper", lambda: None)
    monkeypatch.setattr(embedding, "matmul_few", functools.partial(matmul_few, interpret=INTERPRET))
    check(rows, MeshConfig().make(jax.devices()[:1]))


@pytest.mark.parametrize("rows", [3, 10])
def test_logits_on_a_mesh(monkeypatch, rows):
    """Catches parts of the vocabulary or groups of rows that change places."""

    def multiply(x, weights):
        out = jnp.dot(x, *weights, preferred_element_type=jnp.float32)
        return jnp.pad(out, ((0, -len(x) % 8), (0, 0)), constant_values=jnp.nan)[None]

    monkeypatch.setattr(embedding, "why_not_hopper", lambda: None)
    monkeypatch.setattr(embedding, "matmul_few", multiply)
    check(rows, MeshConfig.parse("data=2,tensor=2").make(jax.devices()[:4]))


@pytest.mark.parametrize(
    ("shape", "V", "served"),
    [((1,), 202048, True), ((64,), 128, True), ((65,), 128, False), ((1,), 120, False),
     ((1, 2), 128, False)],
)  # fmt: skip
def test_who_multiplies(monkeypatch, shape, V, served):
    monkeypatch.setattr(embedding, "why_not_hopper", lambda: None)
    hidden = jax.ShapeDtypeStruct((*shape, 128), jnp.bfloat16)
    why = embedding._why_not_by_kernel(hidden, jax.ShapeDtypeStruct((128, V), jnp.bfloat16))
    assert (why is None) == served
