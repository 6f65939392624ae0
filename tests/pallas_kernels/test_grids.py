"""How kernels are launched at the largest sizes: CUDA's limits, and no scratch of JAX's."""

import functools
import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax._src.core import jaxprs_in_params
from jax._src.pallas.mosaic_gpu import lowering
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels
from jaxmoe.config import MAVERICK, SCOUT
from pallas_kernels.attention import Coords, decode_attention, flash_attention
from pallas_kernels.compile.absent import absent_h100s, lower_for, mesh_of
from pallas_kernels.experts import GroupMetadata, combine, dispatch, gated_matmul, grouped_matmul
from pallas_kernels.quantized import quantize, quantize_matrix
from pallas_kernels.step import (
    MAX_TOKENS,
    HeadPlan,
    add_rms_norm,
    busy_experts,
    experts_down,
    experts_gate_up,
    matmul_few,
    write_heads,
)

pytestmark = pytest.mark.absent_gpu

X_LIMIT, LIMIT = 2**31 - 1, 65535  # blocks along x, and along each of y and z
TOKENS, ROWS = 10_027_008, 256
HEADS, KV_HEADS, HEAD_DIM = SCOUT.num_attention_heads, SCOUT.num_key_value_heads, SCOUT.head_dim
D, F, WIDEST = SCOUT.hidden_size, SCOUT.intermediate_size, SCOUT.intermediate_size_mlp
EXPERTS = MAVERICK.num_local_experts


class Launch(NamedTuple):
    """One kernel as it is launched."""

    name: str
    grid: tuple[int, ...]
    params: plgpu.CompilerParams


def launches(function, *arguments) -> list[Launch]:
    """The grids of all kernels in a function of ShapeDtypeStructs, traced for an H100."""
    with jax.sharding.use_abstract_mesh(mesh_of(absent_h100s(1)[0]).abstract_mesh):
        return list(_launches(jax.make_jaxpr(function)(*arguments).jaxpr))


def _launches(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "mpmd_map":
            (mesh,), params = equation.params["meshes"], equation.params["compiler_params"]
            assert not mesh.cluster
            yield Launch(equation.params["name"], mesh.grid, params)
        else:
            yield from itertools.chain(*map(_launches, jaxprs_in_params(equation.params)))


def blocks(grid):
    """Along CUDA's x, y and z: the last axis of a grid is x, and all before the last two are z."""
    *outer, y, x = (1, 1, *grid)
    return x, y, math.prod(outer)


def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def integers(*shape):
    return shaped(*shape, dtype=jnp.int32)


def flash(rows, tokens):
    """Forward and backward."""
    q, kv = shaped(rows, HEADS, tokens, HEAD_DIM), shaped(rows, KV_HEADS, tokens, HEAD_DIM)

    def gradients(q, k, v, coords):
        attend = functools.partial(flash_attention, q_coords=coords, k_coords=coords, scale=0.1)
        return jax.vjp(attend, q, k, v)[1](q)

    return gradients, q, kv, kv, Coords(*[integers(rows, tokens)] * 2)


def decode(rows, page, format):
    """With all tokens in the pages of one row, and each row free to have as many."""
    q, kv = shaped(rows, HEADS, 1, HEAD_DIM), shaped(TOKENS // page, KV_HEADS, page, HEAD_DIM)
    if format != "bfloat16":
        kv = jax.eval_shape(lambda x: quantize(x, format), kv)

    def attend(q, kv, q_coords, k_coords, table):
        return decode_attention(q, kv, kv, q_coords, k_coords, table=table, scale=0.1)

    coords = [Coords(*[integers(*shape)] * 2) for shape in ((rows, 1), (TOKENS // page, page))]
    return attend, q, kv, *coords, integers(rows, TOKENS // page)


def moves(tokens):
    """There, back and back to the shared expert's, with gradients."""
    rows = tokens + EXPERTS * 128
    plan = GroupMetadata(integers(tokens), integers(rows), integers(rows // 128), integers(EXPERTS))

    def all_moves(plan, x, y):
        _, to_x = jax.vjp(functools.partial(dispatch, plan), x)
        _, to_both = jax.vjp(functools.partial(combine, plan), y, x)
        return dispatch(plan, x), combine(plan, y, x), to_x(y), to_both(x)

    return all_moves, plan, shaped(tokens, D), shaped(rows, D)


def grouped(tokens, block, groups, into, out, format=None):
    """Products, gated ones, and gradients."""
    count = tokens // block + groups
    x, w, group = shaped(count * block, into), shaped(groups, into, out), integers(count)

    def products(x, w, group):
        if format is not None:
            w = quantize_matrix(w, format)
        loss = jax.vjp(lambda x: grouped_matmul(x, w, group), x)
        return gated_matmul(x, w, w, group), loss[1](loss[0])

    def gradients(x, w, group):
        out, transpose = jax.vjp(lambda x, w: grouped_matmul(x, w, group), x, w)
        return gated_matmul(x, w, w, group), transpose(out)

    return products if format else gradients, x, w, group


def decode_step(tokens):
    """What a step of few tokens does between its attention kernels, one after the other."""
    pages = shaped(TOKENS // 64, KV_HEADS, 64, HEAD_DIM)
    plan = HeadPlan(*[shaped(MAX_TOKENS, HEAD_DIM, dtype=jnp.float32)] * 2, None, integers(tokens))
    matrix, wide = shaped(EXPERTS, D, F), shaped(D, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    down, expert = shaped(EXPERTS, F, D), integers(tokens)

    def run(x, weight, wide, plan, pages, matrix, down, expert):
        normed = add_rms_norm(x, x.astype(jnp.float32), weight, 1e-5)[1]
        qkv = matmul_few(normed, (wide,), parts=None)
        heads = write_heads(qkv, plan, pages, pages, heads=HEADS, norm_eps=1e-5)
        slots, shared = busy_experts(expert, EXPERTS), (matrix[0], matrix[0])
        hidden = experts_gate_up(x, (matrix, matrix), shared, expert, x[:, 0], slots)
        return heads, experts_down(hidden, down, down[0], expert, slots)

    return run, shaped(tokens, D), shaped(D), wide, plan, pages, matrix, down, expert


SIZES = {"all": TOKENS, "shard": TOKENS // 8}
CALLS = {f"flash {name}": flash(1, tokens) for name, tokens in SIZES.items()}
CALLS |= {f"flash {ROWS} rows": flash(ROWS, TOKENS // ROWS)}
CALLS |= {
    f"decode {rows} rows {format}": decode(rows, 64, format)
    for rows in (1, ROWS)
    for format in ("bfloat16", "int8", "fp8", "int4")
}
CALLS |= {f"step of {tokens}": decode_step(tokens) for tokens in (1, MAX_TOKENS)}
CALLS |= {f"moves {name}": moves(tokens) for name, tokens in SIZES.items()}
CALLS |= {
    f"grouped {name} {block} {groups} {into} {format}": grouped(
        tokens, block, groups, into, out, format
    )
    for name, tokens in SIZES.items()
    for block in (8, 64, 128)
    for groups, into, out in ((1, D, WIDEST), (16, F, D), (EXPERTS, D, F))
    for format in (None, "int8", "int4")
}


@pytest.fixture(scope="module")
def traced():
    """What each call launches."""
    return functools.cache(lambda call: launches(*CALLS[call]))


@pytest.mark.parametrize("call", CALLS)
def test_grids_are_within_cudas_limits(traced, call):
    """Beyond them a launch fails, and on no smaller size does it show."""
    assert traced(call)
    for name, grid, _ in traced(call):
        x, y, z = blocks(grid)
        assert x <= X_LIMIT and max(y, z) <= LIMIT, f"{name} has {x} x {y} x {z} blocks"


@pytest.mark.parametrize("call", CALLS)
def test_no_kernel_has_jaxs_reduction_scratch(traced, call):
    """It lies at one place, for which the warpgroups of a block would race."""
    for name, _, params in traced(call):
        assert params.reduction_scratch_bytes == 0, name


def test_every_kernel_is_here(traced):
    """Catches a kernel that none of the calls reaches."""
    sources = Path(pallas_kernels.__file__).parent.rglob("*.py")
    named = re.findall(r'kernel_name="(\w+)"', "".join(path.read_text() for path in sources))
    assert set(named) == {launch.name for call in CALLS for launch in traced(call)}


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_the_compiler_maps_axes_as_we_do(axes):
    grid = (2, 3, 5, 7)[:axes]

    def call(x):
        names = {"grid": grid, "grid_names": tuple("abcd"[:axes])}
        return plgpu.kernel(lambda x, out: None, out_type=shaped(8), **names)(x)

    found = []

    def noted(*arguments, **options):
        found.append(lower(*arguments, **options))
        return found[-1]

    lower = lowering.lower_jaxpr_to_module
    with mock.patch.object(lowering, "lower_jaxpr_to_module", noted):
        lower_for(absent_h100s(1)[0], call, shaped(8))
    assert [result.grid for result in found] == [blocks(grid)]
