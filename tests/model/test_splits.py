"""One MoE layer on every split of eight devices: one device's answer, gradients and statistics."""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import pytest

from jaxmoe.mesh import AXES, MeshConfig
from jaxmoe.model import moe
from tests.model import moe_layer

SPLITS = [
    MeshConfig(**dict(zip(AXES, sizes, strict=True)))
    for sizes in itertools.product((1, 2, 4, 8), repeat=len(AXES))
    if math.prod(sizes) == 8
]


def _tier(split):
    """`make test` runs the splits over one axis, and those over experts and two other axes."""
    sizes = dataclasses.astuple(split)
    return () if 8 in sizes or (max(sizes) == split.expert == 2) else pytest.mark.slow


# Rows and tokens a row. Every split divides eight rows; of one row, other axes than sequence and
# tensor hold copies.
FEW, MANY, ONE_ROW = (8, 8), (8, 72), (1, 16)
# The number of tokens changes how they travel only where experts lie on several devices; without,
# each axis alone, and three at once.
CASES = [
    pytest.param(split, shape, id=f"{split} {name}", marks=_tier(split))
    for name, shape in [("few", FEW), ("many", MANY), ("one row", ONE_ROW)]
    for split in SPLITS
    if split.expert > 1 or (shape == MANY and 4 not in dataclasses.astuple(split))
]
TOLERANCE = 1e-5  # of the largest entry: float32 sums in another order


@functools.cache
def case(shape):
    """Most tokens choose one expert, some are padding; of few tokens each has one expert."""
    config = moe_layer.config(k=1 if shape == FEW else 2)
    return config, *moe_layer.draw(config, *shape, skew=4.0)


@functools.cache
def on_one_device(shape):
    return moe_layer.results(*case(shape))


@pytest.mark.parametrize(("split", "shape"), CASES)
def test_same_as_on_one_device(split, shape):
    config, p, x, real = case(shape)
    mesh = split.make()
    with jax.set_mesh(mesh):
        got = moe_layer.results(config, moe_layer.place(config, p, mesh), x, real)
    named = jax.tree_util.tree_leaves_with_path(on_one_device(shape))
    for (path, want), ours in zip(named, jax.tree.leaves(got), strict=True):
        if want.dtype == np.int32:
            np.testing.assert_array_equal(ours, want, err_msg=str(path))
        else:
            assert abs(ours - want).max() <= TOLERANCE * abs(want).max(), path


def test_cases_meet_every_way():
    """Also with experts on several devices, where there is something to bring together."""
    ways = {
        (split.expert > 1, moe.expert_exchange(split.make(), (*shape, 16)))
        for split, shape in (param.values for param in CASES)
    }
    assert ways == {
        (False, "replicated"),
        (True, "replicated"),
        (True, "all_gather"),
        (True, "all_to_all"),
    }


@pytest.mark.parametrize("shape", [FEW, MANY, ONE_ROW])
def test_cases_are_skewed_and_padded(shape):
    """And no choice of an expert is so close that rounding may decide it."""
    config, p, x, real = case(shape)
    k, stats = config.num_experts_per_tok, on_one_device(shape)["stats"]
    assert stats["tokens"] == real.sum() < real.size
    assert stats["assignments"].sum() == k * stats["tokens"] and stats["dropped"] == 0
    assert stats["assignments"][0] > 0.6 * stats["tokens"]
    ordered = np.sort(x @ p["router"], axis=-1)[np.asarray(real)]
    assert (ordered[..., -k] - ordered[..., -k - 1]).min() > 1e-5
