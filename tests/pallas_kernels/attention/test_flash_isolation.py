"""NaN and inf of one row, head, query or padding reach no other result of `flash_attention`."""

import functools

import numpy as np
import pytest

from tests.isolation import assert_isolated, is_spoiled
from tests.pallas_kernels.attention.cases import Case, Results, draw, itself, place, rule
from tests.pallas_kernels.attention.ways import (
    MOSAIC_GPU,
    SPLASH,
    XLA,
    differentiated,
    differentiated_alone,
    over,
    runs,
)

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the interpreter

OPTIONS = {"heads": (2, 2), "chunk": None, "blocks": (32, 64)}
KEYS = place([(1, 40), (0, 10), (2, 85), (0, 25)], [(0, 7), (1, 153)])
QUERIES = place([(1, 40), (0, 10), (2, 85), (9, 25)], [(0, 7), (1, 153)])
CASE = Case("padding, and queries that see nothing", QUERIES, KEYS, **OPTIONS)
ITSELF = itself("padding", KEYS, **OPTIONS)  # what splash takes


def row(case, q, k):
    q[1], k[1] = True, True
    return q, k, k


def head(case, q, k):
    q[:, 1], k[:, 1] = True, True
    return q, k, k


def query(case, q, k):
    """Its gradients reach the keys that it sees, and through a tile others of its head."""
    reached = k.copy()
    q[0, 0, 20], reached[0, 0] = True, True
    return q, k, reached


def unseen(case, q, k):
    """Padding, and queries that see nothing."""
    q |= ~rule(case).any(2)[:, None]
    k |= (case.k.segment == 0)[:, None]
    return q, k, k


def spoil(x, hit):
    """A copy with NaN and inf there, by turns."""
    x = np.array(x)
    x[hit] = np.resize([np.nan, np.inf, -np.inf], x[hit].shape)
    return x


def run(way, case, q, k, v, d_out, d_lse):
    """Calls without the log-sum-exp run on splash's own kernels."""
    if way is not SPLASH:
        return way.call(differentiated, case, q, k, v, d_out, d_lse)
    out, *gradients = way.call(differentiated_alone, case, q, k, v, d_out)
    return Results(out, np.zeros(d_lse.shape), *gradients)


@functools.cache
def unspoiled(way, dtype, case):
    return run(way, case, *draw(case, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("spoiled", [row, head, query, unseen])
@over(
    runs(XLA, "float32", [CASE]),
    runs(XLA, "bfloat16", [CASE]),
    runs(SPLASH, "float32", [ITSELF]),
    runs(MOSAIC_GPU, "bfloat16", [CASE]),
)
def test_results_are_isolated(way, dtype, case, spoiled):
    """Bit by bit; and what is spoiled itself stays visible."""
    q, k, v, d_out, d_lse = draw(case, dtype)
    q_hit, k_hit, reached = spoiled(case, np.zeros(q.shape[:3], bool), np.zeros(k.shape[:3], bool))
    q, d_out, d_lse = (spoil(x, q_hit) for x in (q, d_out, d_lse))
    k, v = (spoil(x, k_hit) for x in (k, v))
    got, want = run(way, case, q, k, v, d_out, d_lse), unspoiled(way, dtype, case)
    for name, hit in zip(Results._fields, (q_hit, q_hit, q_hit, reached, reached), strict=True):
        assert_isolated(getattr(got, name), getattr(want, name), hit)
    assert is_spoiled(np.asarray(got.out)[q_hit]) or spoiled is unseen
