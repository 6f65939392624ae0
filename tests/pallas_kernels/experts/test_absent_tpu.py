"""The megablox kernels at Llama 4's sizes, compiled for absent TPUs."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.config import SCOUT
from pallas_kernels.compile.absent import absent_tpus, lower_for, mesh_of
from pallas_kernels.experts import (
    block_rows,
    gated_matmul,
    grouped_implementation,
    grouped_matmul,
)

pytestmark = pytest.mark.absent_tpu

TPUS = ["v5p:2x2x1", "v6e:2x2"]
D, F, TOKENS = SCOUT.hidden_size, SCOUT.intermediate_size, 16384


def arguments(dtype="bfloat16", block=128, groups=16):
    """Shapes of rows, hidden values, matrices, group of each block and scale of each row."""
    rows, into, out = TOKENS + block * groups, (groups, D, F), (groups, F, D)
    arrays = [jax.ShapeDtypeStruct(z, dtype) for z in ((rows, D), (rows, F), into, into, out)]
    group = jax.ShapeDtypeStruct((rows // block,), jnp.int32)
    return *arrays, group, jax.ShapeDtypeStruct((rows,), jnp.float32)


def products_and_gradients(x, h, gate, up, down, group, scale):
    """Gated and plain products with their gradients, each with the other as its cotangent."""
    multiply = functools.partial(grouped_matmul, group_of_block=group)
    into, out = (jax.vjp(multiply, *operands) for operands in ((x, up), (h, down)))
    return gated_matmul(x, gate, up, group, scale), out[0], into[1](h), out[1](x)


def first_of(topology):
    return absent_tpus(topology)[0]


@pytest.mark.parametrize(
    "topology, dtype, block",
    [(TPUS[0], "bfloat16", 8), (TPUS[0], "bfloat16", 64)]
    + [(topology, dtype, 128) for topology in TPUS for dtype in ("bfloat16", "float32")],
)
def test_compiles_for_tpus(topology, dtype, block):
    """Catches tiles that do not fit into a TPU's on-chip memory."""
    shapes = arguments(dtype, block)
    compiled = lower_for(first_of(topology), products_and_gradients, *shapes).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 7
    rows, _ = shapes[0].shape
    product = rows * F * shapes[0].dtype.itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 2.1 * product  # gate's and up's


@pytest.mark.parametrize("topology", TPUS)
def test_tpus_get_megablox(topology):
    x, _, _, up, _, group, _ = arguments()
    assert grouped_implementation(x, up, group) == "xla"
    with jax.sharding.use_abstract_mesh(mesh_of(first_of(topology)).abstract_mesh):
        assert grouped_implementation(x, up, group) == "megablox"
        assert block_rows(1, 16) == 8  # as few as the kernels take, also for a lone token
    assert block_rows(1, 16) == 1
