"""Cases of grouped items with their arrays, and reference results in float64 NumPy by item."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
import pytest

from pallas_kernels.experts import make_group_metadata


@dataclasses.dataclass(frozen=True)
class Case:
    """Items and their groups.

    A group of E or more means that the item has none. `block` is the rows of a block, and D and F
    are the inputs and outputs of the matrices.
    """

    name: str
    group: tuple[int, ...]
    E: int
    block: int
    D: int = 5
    F: int = 3

    @property
    def items(self):
        return np.array(self.group, np.int32)

    @property
    def empty_groups(self):
        return np.setdiff1d(np.arange(self.E), self.items)


def drawn(count, below, seed=0):
    return tuple(np.random.default_rng(seed).integers(0, below, count).tolist())


def sized(*sizes, seed=0):
    """The groups of items, shuffled, such that group i has sizes[i] items."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return tuple(np.random.default_rng(seed).permutation(group).tolist())


def streamed(name, group, E=4, block=8):
    return Case(name, group, E, block, D=128, F=64)


def tiled(name, group, E=3):
    return Case(name, group, E, block=128, D=256, F=256)


TWO_A_TOKEN = np.stack([drawn(12, 4), drawn(12, 4, 1)], 1).ravel().tolist()
CASES = [
    Case("uneven", drawn(50, 4), 4, 8),
    Case("empty groups", (6, 1, 1, 6, 1, 3, 6, 6, 1), 8, 4),
    Case("first and last group empty", (2, 1, 2, 2, 1), 4, 2),
    Case("all in one group", (2,) * 19, 4, 8),
    Case("one item", (3,), 4, 8),
    Case("one group", (0,) * 10, 1, 4),
    Case("128 groups", drawn(200, 128), 128, 1),
    Case("128 groups, few items", drawn(5, 128), 128, 4),
    Case("some without a group", (4, 0, 5, 3, 0, 99, 4, 1), 4, 2),
    Case("all without a group", (4, 4, 4), 4, 2),
    Case("whole blocks", (0, 1) * 8, 2, 4),
    Case("a block larger than all", drawn(6, 3), 3, 16),
    Case("two experts a token", tuple(TWO_A_TOKEN), 4, 4),
]
# Sizes that the kernels serve. Cases of equal shape share a compilation.
KERNEL_CASES = [
    streamed("blocks of 8, two experts a token", tuple(TWO_A_TOKEN)),
    streamed("blocks of 8, first and last group empty", sized(0, 13, 11, 0)),
    streamed("blocks of 8, all in one group", (2,) * 24),
    streamed("blocks of 8, whole blocks, some without a group", sized(8, 0, 8, 0, 4, 4)),
    streamed("blocks of 8, one item", (3,)),
    streamed("blocks of 8, 128 groups, few items", drawn(5, 128), E=128),
    tiled("blocks of 128, first group empty, some without a group", sized(0, 129, 4, 3)),
    tiled("blocks of 128, whole block, last group empty", sized(128, 8, 0)),
]
FORWARD_CASES = [
    streamed("blocks of 16", sized(0, 15, 3), E=3, block=16),
    streamed("blocks of 32", sized(33, 0, 2), E=3, block=32),
    streamed("blocks of 64", sized(2, 0, 65), E=3, block=64),
    tiled("blocks of 128, all without a group", (3,) * 136),
]
ALL_CASES = CASES + KERNEL_CASES + FORWARD_CASES


def on_tpus(cases):
    """The cases with widths that are multiples of 128 lanes, as TPU kernels take them."""
    return [dataclasses.replace(case, D=max(case.D, 256), F=max(case.F, 128)) for case in cases]


def named(name):
    (case,) = [case for case in ALL_CASES if case.name == name]
    return case


def planned(case):
    return jax.jit(make_group_metadata, static_argnums=(1, 2))(case.items, case.E, case.block)


class Arrays(NamedTuple):
    x: np.ndarray
    scale: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    d_out: np.ndarray  # the cotangent of the items' products


def draw(case, dtype="float32") -> Arrays:
    """Random arrays; matrices of groups without items are NaN, so that any use of them shows."""
    rng, N, matrices = np.random.default_rng(0), len(case.group), (case.E, case.D, case.F)
    shapes = Arrays((N, case.D), (N,), matrices, matrices, (N, case.F))
    arrays = Arrays(*(rng.standard_normal(shape).astype(dtype) for shape in shapes))
    arrays.gate[case.empty_groups] = arrays.up[case.empty_groups] = np.nan
    return arrays._replace(scale=rng.uniform(0.1, 1, N).astype(np.float32))


class Results(NamedTuple):
    """The product x @ up by group, and its gradients."""

    out: np.ndarray
    dx: np.ndarray
    dw: np.ndarray


class GatedResults(NamedTuple):
    """silu(scale * x @ gate) * (scale * x @ up) by group, and its gradients."""

    out: np.ndarray
    dx: np.ndarray
    d_scale: np.ndarray
    d_gate: np.ndarray
    d_up: np.ndarray


def judge(case, arrays: Arrays) -> Results:
    x, _, _, w, d_out = (np.asarray(z).astype(np.float64) for z in arrays)
    out, dx, dw = (np.zeros(z.shape) for z in (d_out, x, w))
    for i, group in placed(case):
        out[i], dx[i] = x[i] @ w[group], w[group] @ d_out[i]
        dw[group] += np.outer(x[i], d_out[i])
    return Results(out, dx, dw)


def judge_gated(case, arrays: Arrays) -> GatedResults:
    x, scale, gate, up, d_out = (np.asarray(z).astype(np.float64) for z in arrays)
    out, *rest = (np.zeros(z.shape) for z in (d_out, x, scale, gate, up))
    dx, d_scale, d_gate, d_up = rest
    for i, e in placed(case):
        g, u = scale[i] * x[i] @ gate[e], scale[i] * x[i] @ up[e]
        sigmoid = 1 / (1 + np.exp(-g))
        out[i] = g * sigmoid * u
        dg = d_out[i] * u * sigmoid * (1 + g * (1 - sigmoid))
        du = d_out[i] * g * sigmoid
        d_scale[i] = (dg @ g + du @ u) / scale[i]
        dx[i] = scale[i] * (gate[e] @ dg + up[e] @ du)
        d_gate[e] += scale[i] * np.outer(x[i], dg)
        d_up[e] += scale[i] * np.outer(x[i], du)
    return GatedResults(out, *rest)


def placed(case):
    """Pairs of an item that has a group, and that group."""
    return [(i, group) for i, group in enumerate(case.group) if group < case.E]


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)
