"""Tests enforce annotations: of arrays by jaxtyping, of the rest by beartype."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from jaxmoe.mesh import MeshConfig
from jaxmoe.model.layers import rms_norm
from pallas_kernels.quantized import quantize_matrix


def test_shapes():
    with pytest.raises(TypeCheckError):
        rms_norm(jnp.ones((2, 3)), jnp.ones(4), 1e-6)
    with pytest.raises(TypeCheckError):
        quantize_matrix(jnp.ones((2, 3, 4), jnp.int32), "int8")


def test_other_types(untyped, monkeypatch):
    with pytest.raises(AttributeError):
        MeshConfig.parse(3)
    monkeypatch.undo()
    with pytest.raises(TypeCheckError):
        MeshConfig.parse(3)
