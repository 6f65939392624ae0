"""A model of quantized matrices computes what these stand for, on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import SCOUT, layer_kinds
from jaxmoe.errors import UserError
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.layers import linear
from jaxmoe.model.params import (
    abstract_params,
    init_params,
    map_specs,
    named_params,
    param_specs,
    quantize_params,
)
from jaxmoe.model.transformer import forward, positions_of, unembed
from pallas_kernels.compile.absent import absent_tpus
from pallas_kernels.quantized import LARGEST, QuantizedMatrix, dequantize_matrix, quantize_matrix
from tests.tiers import slow_after_first

# Widths that int4, which packs 128 inputs, can be cut at.
CONFIG = dataclasses.replace(
    SCOUT,
    hidden_size=256,
    intermediate_size=512,
    intermediate_size_mlp=512,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=128,
    vocab_size=64,
    num_local_experts=4,
    attention_chunk_size=16,
    layers=tuple(
        dataclasses.replace(kind, feed_forward="dense" if i == 1 else "moe")
        for i, kind in enumerate(layer_kinds(4))
    ),
)
MESHES = {"int8": "data=2,fsdp=2,tensor=2", "fp8": "tensor=4,data=2", "int4": "expert=4,sequence=2"}
every_format = pytest.mark.parametrize("format", LARGEST)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def stand_for(params):
    def widened(spec, w):
        return dequantize_matrix(w).reshape(spec.shape) if isinstance(w, QuantizedMatrix) else w

    return map_specs(widened, param_specs(CONFIG), params)


@jax.jit
def logits(params):
    tokens = jnp.arange(48).reshape(2, 24) % CONFIG.vocab_size
    segments = jnp.ones_like(tokens).at[1, :5].set(0)
    hidden = forward(CONFIG, params, tokens, positions_of(segments), segments).hidden
    return unembed(CONFIG, params, hidden) * (segments != 0)[..., None]


@pytest.mark.parametrize("format", slow_after_first(LARGEST))
def test_logits(params, format):
    """Without a mesh and on one."""
    stored = quantize_params(CONFIG, params, format)
    want = logits(stand_for(stored))
    assert jnp.abs(want - logits(params)).max() > 1e-2
    np.testing.assert_allclose(logits(stored), want, atol=1e-4)
    mesh = MeshConfig.parse(MESHES[format]).make()
    places = jax.tree.map(lambda x: x.sharding, abstract_params(CONFIG, mesh, jnp.float32, format))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(logits(jax.device_put(stored, places)), want, atol=1e-4)


@every_format
def test_what_is_quantized(params, format):
    """All matrices of layers but routers; norms and embeddings never."""
    stored = named_params(CONFIG, quantize_params(CONFIG, params, format))
    plain = {name for name, (_, w) in stored.items() if not isinstance(w, QuantizedMatrix)}
    kinds = {name.split(".", 2)[-1] for name in plain}
    assert kinds == {
        "embed",
        "lm_head",
        "norm",
        "attention_norm",
        "feed_forward_norm",
        "feed_forward.router",
    }
    for name, (spec, w) in stored.items():
        if name not in plain:
            assert w.format == format and w.shape == spec.matrix_shape
    again = quantize_params(CONFIG, quantize_params(CONFIG, params, format), format)
    jax.tree.map(np.testing.assert_array_equal, again, quantize_params(CONFIG, params, format))


def test_a_mesh_that_would_cut_packed_inputs():
    mesh = MeshConfig.parse("tensor=8").make()
    config = dataclasses.replace(CONFIG, num_attention_heads=8, num_key_value_heads=8)
    with pytest.raises(UserError, match=r"tensor=8 does not divide the 4 of 'ffn' in layers\.0"):
        abstract_params(config, mesh, jnp.float32, "int4")


@pytest.mark.absent_tpu
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
@every_format
def test_tpus_read_dense_matrices_as_stored(untyped, topology, format):
    """Catches matrices that are widened in memory, of which a copy would be a temporary."""
    w = jax.ShapeDtypeStruct((SCOUT.hidden_size, SCOUT.intermediate_size_mlp), jnp.bfloat16)
    w = jax.eval_shape(lambda w: quantize_matrix(w, format), w)
    x = jax.ShapeDtypeStruct((3, 1, SCOUT.hidden_size), jnp.bfloat16)
    with jax.set_mesh(MeshConfig().make(absent_tpus(topology)[:1])):
        compiled = jax.jit(functools.partial(linear, "BSD,DF->BSF")).lower(x, w).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20
