"""Grouped matmuls at Llama 4's sizes, compiled for absent H100s and H200s."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.config import SCOUT
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.moe import moe
from pallas_kernels.compile.absent import (
    absent_h100s,
    absent_h200s,
    compiler_options,
    lower_for,
    mesh_of,
)
from pallas_kernels.compile.assembler import assembler_reports
from pallas_kernels.experts import gated_matmul, grouped_implementation, grouped_matmul
from pallas_kernels.experts.grouped_mosaic import GroupedMosaicConfig
from pallas_kernels.experts.mosaic_kernels import TileConfig
from pallas_kernels.quantized import quantize_matrix

pytestmark = pytest.mark.absent_gpu

DEVICES = {"h100": absent_h100s, "h200": absent_h200s}
D, F, TOKENS = SCOUT.hidden_size, SCOUT.intermediate_size, 16384
TILES, STREAM, GRADIENT, QUANTIZED = (
    f"grouped_matmul{name}_mosaic_gpu_kernel" for name in ("", "_stream", "_gradient", "_quantized")
)
# The assembler adds a wgmma fence, which costs nothing: there are none of it too few.
HARMLESS = "(C7519)"
# Groups, block and rows: of Scout's prefill, and of Maverick's decoding.
SIZES = {
    "scout": (16, 128, TOKENS + 16 * 128),
    "maverick-8": (128, 8, 256 + 128 * 8),
    "maverick-64": (128, 64, TOKENS + 128 * 64),
}


def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def arguments(size, into=D, out=F):
    """Shapes of rows, matrices, the group of each block and the scale of each row."""
    groups, block, rows = SIZES[size]
    return (
        shaped(rows, into),
        shaped(groups, into, out),
        shaped(rows // block, dtype=jnp.int32),
        shaped(rows, dtype=jnp.float32),
    )


def up(x, w, group, scale, **options):
    return grouped_matmul(x, w, group, **options)


def gated(x, w, group, scale, **options):
    return gated_matmul(x, w, w, group, scale, **options)


def gradients(x, w, group, scale):
    def loss(x, w):
        return grouped_matmul(x, w, group).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1))(x, w)


def check(lowered, kernels):
    """Asserts the number of kernels, no spilled registers, and no serialized products."""
    reports = assembler_reports(lowered, compiler_options())
    assert sorted(report.name for report in reports) == sorted(kernels)
    for report in reports:
        assert (report.spill_stores, report.spill_loads) == (0, 0)
        assert not [line for line in report.warnings if HARMLESS not in line]
        assert report.registers <= 255 and report.wgmma > 0


@pytest.mark.parametrize("function", [up, gated])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_forward(device, size, function):
    lowered = lower_for(*DEVICES[device](1), function, *arguments(size))
    check(lowered, [TILES if size == "scout" else STREAM])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_down(device, size):
    lowered = lower_for(*DEVICES[device](1), up, *arguments(size, into=F, out=D))
    check(lowered, [TILES if size == "scout" else STREAM])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_gradients(device, size):
    """Gradients need no forward products; small blocks leave the weights' gradient to XLA."""
    lowered = lower_for(*DEVICES[device](1), gradients, *arguments(size))
    check(lowered, [TILES, GRADIENT] if size == "scout" else [STREAM])


@pytest.mark.parametrize("stored", ["int8", "fp8", "int4", "int8-128", "fp8-1024"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("device", "function"), [("h100", gated), ("h200", up)])
def test_quantized(device, size, stored, function):
    """Each device takes one of the two products."""
    x, w, *rest = arguments(size)
    format, _, width = stored.partition("-")
    w = jax.eval_shape(lambda w: quantize_matrix(w, format, int(width or 0) or None), w)
    lowered = lower_for(*DEVICES[device](1), function, x, w, *rest)
    check(lowered, [QUANTIZED])
    memory = lowered.compile(compiler_options()).memory_analysis()
    assert memory.temp_size_in_bytes < 2**20  # no matrix is copied


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_kernels_are_picked(device, size):
    with jax.sharding.use_abstract_mesh(mesh_of(*DEVICES[device](1)).abstract_mesh):
        for shapes in (arguments(size), arguments(size, into=F, out=D)):
            assert grouped_implementation(*shapes[:3]) == "mosaic_gpu"


def layer_arguments():
    """Shapes of a Scout layer's parameters, its tokens, and which tokens are no padding."""
    E, shared = SCOUT.num_local_experts, {"gate": (D, F), "up": (D, F), "down": (F, D)}
    experts = {name: (E, *shape) for name, shape in shared.items()}
    shapes = {"router": (D, E), "shared": shared, "experts": experts}
    p = jax.tree.map(lambda shape: shaped(*shape), shapes, is_leaf=lambda x: isinstance(x, tuple))
    return p, shaped(1, TOKENS, D), shaped(1, TOKENS, dtype=jnp.bool_)


def test_memory_of_a_layer():
    """Catches an extra copy of rows or of hidden values.

    Besides the output, at most two arrays need to exist at the same time: the routed rows and
    their hidden values, or gate and up of the shared expert.
    """
    mesh = MeshConfig().make(absent_h100s(1))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), layer_arguments()
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(functools.partial(moe, SCOUT)).lower(*placed)
    memory = lowered.compile(compiler_options()).memory_analysis()
    _, _, rows = SIZES["scout"]
    activations = 2 * max(rows * (D + F), TOKENS * 2 * F)  # bytes
    assert "grouped_matmul" in lowered.as_text()
    assert memory.temp_size_in_bytes < 1.2 * activations


def test_spills_are_seen():
    """The check fails for a tile of 512 columns, whose accumulators exceed the registers."""
    function = functools.partial(
        gated, config=GroupedMosaicConfig(TileConfig(columns=512, slots=1))
    )
    lowered = lower_for(*absent_h100s(1), function, *arguments("scout"))
    with pytest.raises(AssertionError):
        check(lowered, [TILES])
