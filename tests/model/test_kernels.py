"""`forward(kernels=)`: every name reaches the calls that it is for."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.model.kernels import Kernels
from jaxmoe.model.kv_cache import PAGE, abstract_cache
from jaxmoe.model.transformer import forward
from tests.conftest import one_device
from tests.pallas_kernels.tpu import INTERPRET


def trace(model, kernels, cached):
    """The shapes of a step of one token; nothing is compiled."""
    shape = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    cache = abstract_cache(model.config, 1, PAGE, "float32", one_device()) if cached else None
    run = functools.partial(forward, model.config, kernels=kernels)
    return jax.eval_shape(run, model.params, shape, shape, shape, cache)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("field", ["experts", "dispatch", "attention"])
def test_a_name_reaches_its_calls(small, field, cached):
    assert trace(small, Kernels(**{field: "xla"}), cached).hidden.shape == (1, 1, 64)
    with pytest.raises(ValueError, match="slowest"):
        trace(small, Kernels(**{field: "slowest"}), cached)


@pytest.mark.parametrize("cached", [False, True])
def test_one_name_for_attention_on_tpus(small, cached):
    """Catches a name that reaches a function whose kernel for TPUs goes by another."""
    trace(small, Kernels(attention="mosaic_tpu", interpret=INTERPRET), cached)
    with pytest.raises(ValueError, match="does not serve this call"):
        trace(small, Kernels(attention="mosaic_tpu"), cached)
