"""Products with experts' matrices at Llama 4's sizes, compiled for absent TPUs."""

import functools

import jax
import pytest

from jaxmoe.config import SCOUT
from pallas_kernels.compile.absent import absent_tpus, lower_for, mesh_of
from pallas_kernels.experts import (
    block_rows,
    gated_matmul,
    grouped_implementation,
    grouped_matmul,
)
from pallas_kernels.experts.grouped import GroupedCase
from pallas_kernels.experts.grouped_tpu import why_not
from pallas_kernels.quantized import quantize_matrix

pytestmark = pytest.mark.absent_tpu

V5P, V6E, V7 = TPUS = ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
D, F, TOKENS = SCOUT.hidden_size, SCOUT.intermediate_size, 16384
SHARE = F // 8  # of experts' outputs, on each of eight devices
KERNEL = 'custom_call_target="tpu_custom_call"'


def matrices(groups, width, format=None):
    """Shapes of gate, up and down."""
    shapes = [jax.ShapeDtypeStruct((groups, *x), "bfloat16") for x in ((D, width), (width, D))]
    if format:
        shapes = [jax.eval_shape(lambda w: quantize_matrix(w, format), w) for w in shapes]
    return shapes[0], *shapes


def first_of(topology):
    return absent_tpus(topology)[0]


def on(topology):
    return jax.sharding.use_abstract_mesh(mesh_of(first_of(topology)).abstract_mesh)


def of_rows(tokens, groups):
    """Shapes of rows of so many tokens, of the group of each block and of the scale of each row."""
    block = block_rows(tokens, groups)
    blocks = min(tokens, tokens // block + groups)
    rows = jax.ShapeDtypeStruct((blocks * block, D), "bfloat16")
    group = jax.ShapeDtypeStruct((blocks,), "int32")
    return rows, group, jax.ShapeDtypeStruct(rows.shape[:1], "float32")


def experts(x, gate, up, down, group, scale):
    return grouped_matmul(gated_matmul(x, gate, up, group, scale), down, group)


@pytest.mark.parametrize(
    "topology, format, tokens, groups, width",
    [
        (V5P, None, 8, 16, F), (V5P, "int8", TOKENS, 16, F), (V5P, "fp8", 64, 128, SHARE),
        (V5P, "int4", 8, 128, SHARE), (V5P, "int4", 1024, 16, F), (V5P, "int4", TOKENS, 16, SHARE),
        (V6E, None, TOKENS, 128, F), (V6E, "int8", 8, 16, F), (V6E, "fp8", 1024, 128, F),
        (V6E, "int4", 64, 16, F), (V7, None, 1024, 16, SHARE), (V7, "int8", 64, 128, SHARE),
        (V7, "fp8", TOKENS, 16, F), (V7, "int4", 8, 16, F),
    ],
)  # fmt: skip
def test_experts_are_read_as_they_lie(topology, format, tokens, groups, width):
    """Catches tiles that do not fit into a TPU's memory on chip, and copies of matrices."""
    gate, up, down = matrices(groups, width, format)
    with on(topology):
        rows, group, scale = of_rows(tokens, groups)
        assert grouped_implementation(rows, gate, group) == "mosaic_tpu"
    shapes = rows, gate, up, down, group, scale
    compiled = lower_for(first_of(topology), experts, *shapes).compile()
    assert compiled.as_text().count(KERNEL) == 2
    hidden_and_scales = rows.shape[0] * (2 * width + 4 * 128)
    assert compiled.memory_analysis().temp_size_in_bytes < hidden_and_scales + 2**20


def products_and_gradients(x, h, gate, up, down, group, scale):
    """Gated and plain products with their gradients, each with the other as its cotangent."""
    multiply = functools.partial(grouped_matmul, group_of_block=group)
    into, out = (jax.vjp(multiply, *operands) for operands in ((x, up), (h, down)))
    return gated_matmul(x, gate, up, group, scale), out[0], into[1](h), out[1](x)


@pytest.mark.parametrize(
    "topology, dtype, block",
    [(V5P, "bfloat16", 8), (V5P, "float32", 128), (V6E, "bfloat16", 128)],
)
def test_gradients_compile_for_tpus(topology, dtype, block):
    rows = TOKENS + 16 * block
    shapes = ((rows, D), (rows, F), (16, D, F), (16, D, F), (16, F, D))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    group, scale = ((rows // block,), "int32"), ((rows,), "float32")
    arrays += [jax.ShapeDtypeStruct(*of_each) for of_each in (group, scale)]
    compiled = lower_for(first_of(topology), products_and_gradients, *arrays).compile()
    assert compiled.as_text().count(KERNEL) == 6
    transposed = rows * (D + F) * arrays[0].dtype.itemsize  # by the kernel of matrices' gradients
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * transposed


@pytest.mark.parametrize("topology", TPUS)
def test_what_tpus_get(topology):
    gate, *_ = matrices(16, F)
    with on(topology):
        rows, group, _ = of_rows(TOKENS, 16)
        assert grouped_implementation(rows, gate, group) == "mosaic_tpu"
        assert block_rows(1, 16) == 8  # as few as the kernels take, also for a lone token
    assert grouped_implementation(rows, gate, group) == "xla"
    assert block_rows(1, 16) == 1


def test_what_the_kernel_leaves_to_others():
    """int4 that XLA would copy, and fp8 where there is none."""
    odd = GroupedCase(8, 16, 640, F, "bfloat16", "int4", 128)
    with on(V5P):
        assert "takes multiples of 256 inputs, not 640: XLA would" in why_not(odd)
    with on("v4:2x2x1"):
        stored = {
            format: GroupedCase(8, 16, D, F, "bfloat16", format, D) for format in ("int8", "fp8")
        }
        assert why_not(stored["int8"]) is None
        assert why_not(stored["fp8"]) == "of fp8 it needs a TPU v5 or later"
