"""dispatch and combine at Scout's size, compiled for absent H100s and H200s."""

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
from pallas_kernels.experts import GroupMetadata, combine, dispatch, move_implementation
from pallas_kernels.experts.moves_mosaic import MoveMosaicConfig
from tests.pallas_kernels.experts.test_absent_gpu import layer_arguments

pytestmark = pytest.mark.absent_gpu

DEVICES = {"h100": absent_h100s, "h200": absent_h200s}
KERNEL = "take_rows_mosaic_gpu_kernel"
D, TOKENS, E, BLOCK = SCOUT.hidden_size, 16384, 16, 128
SIZES = {"scout": (TOKENS, TOKENS + E * BLOCK), "one token": (1, 8), "odd": (1001, 1013)}


def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def arguments(size, width=D, dtype=jnp.bfloat16):
    """Shapes of group metadata, its items and its rows."""
    N, R = SIZES[size]
    plan = GroupMetadata(*(shaped(count, dtype=jnp.int32) for count in (N, R, E, E)))
    return plan, shaped(N, width, dtype=dtype), shaped(R, width, dtype=dtype)


def go(plan, x, y, **options):
    return dispatch(plan, x, **options)


def back(plan, x, y, **options):
    return combine(plan, y, **options)


def back_to_shared(plan, x, y, **options):
    return combine(plan, y, x, **options)


def gradients(plan, x, y, **options):
    """The gradients of both moves, which need no forward results."""
    _, to_x = jax.vjp(lambda x: dispatch(plan, x, **options), x)
    _, to_both = jax.vjp(lambda y, shared: combine(plan, y, shared, **options), y, x)
    return to_x(y), to_both(x)


MOVES = {go: 1, back: 1, back_to_shared: 1, gradients: 2}  # moves, and how many kernels each has


def check(lowered, kernels):
    """Asserts no spills, room for five blocks on a multiprocessor, and memory for results only."""
    reports = assembler_reports(lowered, compiler_options())
    assert [report.name for report in reports] == [KERNEL] * kernels
    for report in reports:
        assert (report.spill_stores, report.spill_loads) == (0, 0)
        assert not report.warnings
        assert report.registers * 128 * 5 <= 65536
    memory = lowered.compile(compiler_options()).memory_analysis()
    assert memory.temp_size_in_bytes < 1024


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
@pytest.mark.parametrize("device", DEVICES)
def test_moves(device, move):
    check(lower_for(*DEVICES[device](1), move, *arguments("scout")), MOVES[move])


@pytest.mark.parametrize("move", [go, back_to_shared], ids=lambda move: move.__name__)
@pytest.mark.parametrize(
    ("size", "width", "dtype"),
    [
        ("odd", D, jnp.bfloat16),
        ("odd", D, jnp.float32),
        ("odd", 384, jnp.bfloat16),
        ("odd", 128, jnp.bfloat16),
    ],
)
def test_other_sizes(size, width, dtype, move):
    check(lower_for(*absent_h200s(1), move, *arguments(size, width, dtype)), 1)


@pytest.mark.parametrize(("move", "rows"), [(go, 22), (back_to_shared, 11)])
def test_largest_blocks(move, rows):
    """The largest config that passes the check of configs fits into shared memory."""
    function = functools.partial(move, config=MoveMosaicConfig(rows=rows))
    lowered = lower_for(*absent_h200s(1), function, *arguments("scout"))
    assert len(assembler_reports(lowered, compiler_options())) == 1


def test_longest_rows():
    lowered = lower_for(*absent_h200s(1), back_to_shared, *arguments("odd", 32768))
    (report,) = assembler_reports(lowered, compiler_options())
    assert report.spill_stores == 0


def test_a_lone_item_is_copied_by_its_index():
    """Catches rows without an item that get the only item.

    The compiler drops axes of size 1 with their index, even if it is out of range. The interpreter
    keeps them.
    """
    lowered = lower_for(*absent_h200s(1), go, *arguments("one token"))
    assert f"tensor<2x{D // 256}x256xbf16>" in lowered.as_text()


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_are_picked(device):
    """Kernels are picked for rows, but not for one router weight per item."""
    with jax.sharding.use_abstract_mesh(mesh_of(*DEVICES[device](1)).abstract_mesh):
        _, x, y = arguments("scout")
        for call in ((x,), (y,), (y, x)):
            assert move_implementation(*call) == "mosaic_gpu"
        assert move_implementation(shaped(TOKENS, 1)) == "xla"


def test_a_layer_moves_its_tokens_by_kernels():
    """A layer dispatches and combines by kernels, and has no XLA gather of rows."""
    mesh = MeshConfig().make(absent_h100s(1))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), layer_arguments()
    )
    with jax.set_mesh(mesh):
        text = jax.jit(functools.partial(moe, SCOUT)).lower(*placed).as_text()
    assert text.count("take_rows_mosaic_gpu") == 2
