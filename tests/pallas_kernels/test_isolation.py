"""NaN or inf in one row, expert or padding leaves the bits of all other results as they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.mesh import MeshConfig, per_device
from pallas_kernels.experts import dispatch, plan_exchange, send, send_back
from pallas_kernels.quantized import LARGEST, QuantizedMatrix, quantize, quantize_matrix
from tests.isolation import assert_isolated, is_spoiled, marked, put
from tests.pallas_kernels.experts import test_moves as moves
from tests.pallas_kernels.experts.cases import draw, named, on_tpus, planned
from tests.pallas_kernels.experts.test_quantized_matrices import quantized
from tests.pallas_kernels.experts.ways import (
    MEGABLOX,
    MOSAIC_GPU,
    MOSAIC_TPU,
    XLA,
    differentiated,
    gated,
    gated_differentiated,
    gated_results,
    over,
    results,
    rows_multiplied,
    runs,
)

# By the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")

UNEVEN = named("uneven")
STREAMED = named("blocks of 8, whole blocks, some without a group")
TILED = named("blocks of 128, first group empty, some without a group")
DIFFERENTIATED = over(
    runs(XLA, "float32", [UNEVEN]),
    runs(XLA, "bfloat16", [STREAMED, TILED]),
    runs(MOSAIC_GPU, "bfloat16", [STREAMED, TILED]),
    runs(MOSAIC_TPU, "bfloat16", on_tpus([STREAMED])),
    runs(MEGABLOX, "float32", [STREAMED, TILED]),
)
FORWARD = over(
    runs(XLA, "bfloat16", [STREAMED, TILED]),
    runs(MOSAIC_GPU, "bfloat16", [STREAMED, TILED, named("blocks of 64")]),
    runs(MOSAIC_TPU, "bfloat16", on_tpus([STREAMED, named("blocks of 64")])),
)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["uneven", "some without a group"])
@pytest.mark.parametrize("options", [moves.XLA, moves.GPU], ids=["xla", "mosaic_gpu"])
def test_moves(options, name, value):
    """Everything of one item, and of its row, at once."""
    plan, arrays = moves.draw(named(name), "bfloat16", 256)
    item, row = 1, int(plan.row_of_item[1])
    places = moves.Arrays(x=item, y=row, shared=item, d_rows=row, d_items=item)
    spoiled = moves.Arrays(*(put(x, at, value) for x, at in zip(arrays, places, strict=True)))
    got, want = (moves.moved(options, plan, given) for given in (spoiled, arrays))
    for name, x, y in zip(got._fields, got, want, strict=True):
        hit = row if name in ("rows", "dy", "dy_summed") else item
        assert_isolated(x, y, marked(len(x), hit))
        assert is_spoiled(x[hit])


def an_item(case):
    """One that shares its group with others, and its group."""
    item = next(i for i, g in enumerate(case.group) if g < case.E and case.group.count(g) > 1)
    return item, case.group[item]


def spoil_item(case, arrays):
    """All that an item brings; which items that hits."""
    item, _ = an_item(case)
    brought = {name: put(getattr(arrays, name), item, np.nan) for name in ("x", "scale", "d_out")}
    return arrays._replace(**brought), marked(len(case.group), item)


def spoil_expert(case, arrays):
    """Its matrices; which items that hits."""
    _, group = an_item(case)
    matrices = {name: put(getattr(arrays, name), group, np.inf) for name in ("gate", "up")}
    return arrays._replace(**matrices), case.items == group


def check(case, got, want, hit_items):
    """Gradients of matrices are hit where one of their items is."""
    hit_groups = marked(case.E, an_item(case)[1])
    for name, x, y in zip(got._fields, got, want, strict=True):
        assert_isolated(x, y, hit_groups if name in ("dw", "d_gate", "d_up") else hit_items)
    assert is_spoiled(got.out[hit_items]) and is_spoiled(got.dx[hit_items])


each_spoiled = pytest.mark.parametrize("spoil", [spoil_item, spoil_expert])


@each_spoiled
@DIFFERENTIATED
def test_products_and_gradients(way, dtype, case, spoil):
    arrays, hit_items = spoil(case, draw(case, dtype))
    got = way.call(differentiated, planned(case), arrays.x, arrays.up, arrays.d_out)
    check(case, got, results(way, dtype, case), hit_items)


@pytest.mark.slow
@each_spoiled
@DIFFERENTIATED
def test_gated_products_and_gradients(way, dtype, case, spoil):
    arrays, hit_items = spoil(case, draw(case, dtype))
    got = way.call(gated_differentiated, planned(case), *arrays)
    check(case, got, gated_results(way, dtype, case), hit_items)


def check_gated(way, case, given, spoiled, hit_items):
    """One kernel multiplies by both matrices at once."""
    got, want = (np.asarray(way.call(gated, planned(case), *x)) for x in (spoiled, given))
    assert_isolated(got, want, hit_items)
    assert is_spoiled(got[hit_items])


@FORWARD
def test_gated_products_that_are_not_differentiated(way, dtype, case):
    """An item, and then an expert's matrix."""
    arrays = draw(case, dtype)
    for spoil in (spoil_item, spoil_expert):
        spoiled, hit_items = spoil(case, arrays)
        check_gated(way, case, arrays[:4], spoiled[:4], hit_items)


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["int8", "fp8", "int4"])
@FORWARD
def test_quantized_matrices(way, dtype, case, stored):
    """Scales, values of fp8, and items, each of another expert than the others."""
    arrays = draw(case, dtype)
    gate, up = (quantized(stored, np.nan_to_num(w)) for w in (arrays.gate, arrays.up))
    item, _ = an_item(case)
    group = next(g for g in case.group if g not in (case.group[item], case.E))
    values = up.qvalue.at[group].set(np.nan) if stored == "fp8" else up.qvalue
    spoiled_up = QuantizedMatrix(values, up.scale.at[group].set(np.inf), up.format)
    x, scale = (put(z, item, np.nan) for z in (arrays.x, arrays.scale))
    hit_items = marked(len(case.group), item) | (case.items == group)
    given = (arrays.x, arrays.scale, gate, up)
    check_gated(way, case, given, (x, scale, gate, spoiled_up), hit_items)


@DIFFERENTIATED
def test_rows_without_an_item(way, dtype, case):
    """In blocks without a group, and at the ends of other blocks."""
    plan, arrays = planned(case), draw(case, dtype)
    unused = np.asarray(plan.item_of_row) == len(case.group)
    rows = np.asarray(dispatch(plan, jnp.asarray(arrays.x)))
    got, want = (
        way.call(rows_multiplied, plan, x, arrays.up) for x in (put(rows, unused, np.nan), rows)
    )
    assert unused.any()
    assert_isolated(got, want, unused)


def test_exchange():
    """The exchange of eight devices; some rows are left out."""
    devices, rows = 8, 3
    rng, count = np.random.default_rng(0), devices * rows
    destination = rng.integers(0, devices + 1, count).astype(np.int32)
    x = rng.standard_normal((count, 4)).astype(np.float32)

    def there_and_back(destination, x):
        plan = plan_exchange(destination, "expert")
        came = send(plan, x, "expert")
        return came, send_back(plan, came, "expert")

    spec = jax.P("expert")
    with jax.set_mesh(MeshConfig(expert=devices).make()):
        travel = jax.jit(per_device(there_and_back, (spec, spec), (spec, spec)))
        want = travel(destination, x)
        for item, device in enumerate(destination):
            came, back = travel(destination, put(x, item, np.nan))
            (hit,) = np.nonzero(np.isnan(came).any(1))
            assert (hit // count == device).all() and len(hit) == (device < devices)
            assert_isolated(came, want[0], marked(len(came), *hit))
            assert_isolated(back, want[1], marked(count, item))
            assert is_spoiled(back[item]) == (device < devices)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("format", LARGEST)
def test_quantize(format, value):
    x = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    got, want = (quantize(jnp.asarray(z), format) for z in (put(x, (1, 5), value), x))
    for y, z in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_isolated(y, z, marked(3, 1))
    assert is_spoiled(got.scale[1])


@pytest.mark.parametrize("format", LARGEST)
def test_quantize_matrix(format):
    """What shares a scale: some inputs of one output."""
    w = np.random.default_rng(0).standard_normal((32, 5)).astype(np.float32)
    got, want = (quantize_matrix(jnp.asarray(z), format, 16) for z in (put(w, (3, 2), np.nan), w))
    assert_isolated(got.scale, want.scale, put(np.zeros((2, 5), bool), (0, 2), True))
    values, whole = (x.qvalue.reshape(5, 2, -1) for x in (got, want))
    assert_isolated(values, whole, put(np.zeros((5, 2), bool), (2, 0), True))
    assert is_spoiled(got.scale[0, 2])
