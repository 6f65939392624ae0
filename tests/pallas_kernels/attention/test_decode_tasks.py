"""How rows are cut into tasks of nearly equal size, and how the tasks' results are joined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.decode_mosaic import _join, plan_tasks
from pallas_kernels.attention.merge import merge
from tests.pallas_kernels.attention.cases import assert_close

plan = jax.jit(plan_tasks, static_argnums=(1, 2))


def random_rows(seed):
    """From none to very many blocks a row, and rows of none among them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, rng.choice([2, 9, 1000]), rng.integers(1, 9))
    return lengths * rng.choice([0, 1, 1, 1], len(lengths)), rng.integers(1, 40), rng.integers(1, 9)


PLANS = {
    "one row": ([100], 8, 4),
    "one block": ([1], 8, 4),
    "no blocks": ([0, 0, 0], 8, 4),
    "one huge row among short ones": ([1, 0, 4096, 2, 1], 16, 4),
    "equal rows": ([64] * 8, 32, 4),
    "more rows than budget": ([3] * 20, 4, 1),
    "budget of one": ([5, 7], 1, 1),
    "last row empty": ([9, 0], 4, 2),
    **{f"random {seed}": random_rows(seed) for seed in range(6)},
}
every_plan = pytest.mark.parametrize(("blocks", "budget", "least"), PLANS.values(), ids=PLANS)


def planned(blocks, budget, least):
    """(row, begin, end) of each task."""
    tasks = plan(np.array(blocks, np.int32), int(budget), int(least))
    return list(zip(*(x.tolist() for x in tasks), strict=True))


@every_plan
def test_every_block_is_in_one_task(blocks, budget, least):
    tasks = planned(blocks, budget, least)
    met = [(row, block) for row, begin, end in tasks for block in range(begin, end)]
    assert sorted(met) == [(row, block) for row, n in enumerate(blocks) for block in range(n)]


@every_plan
def test_tasks_are_of_one_size_but_for_the_last_of_a_row(blocks, budget, least):
    """The size that shares all blocks out over the budget, or the least."""
    size = max(least, -(-sum(blocks) // budget))
    for row, begin, end in planned(blocks, budget, least):
        assert end - begin == size or end == blocks[row] or begin == end
        assert end - begin <= size


@every_plan
def test_number_of_tasks(blocks, budget, least):
    """Known at trace time; those to spare are of a row that there is, and have no blocks."""
    tasks = planned(blocks, budget, least)
    assert len(tasks) == budget + len(blocks)
    assert all((row, begin) == (0, 0) for row, begin, end in tasks if begin == end)


def parts_of(scores, values, tasks):
    """Output [N, W, K, d, R] and log-sum-exp [N, W, K, R] of `tasks`, (row, keys of each part)."""
    parts = [[softmax(scores[row][..., t], values[row][:, t]) for t in keys] for row, keys in tasks]
    outs, sums = ([[part[i] for part in task] for task in parts] for i in (0, 1))
    return np.array(outs, np.float32).swapaxes(-1, -2), np.array(sums, np.float32)


def softmax(scores, values):
    """Output [K, R, d] and log-sum-exp [K, R]."""
    if not scores.size:
        return np.zeros((*scores.shape[:2], values.shape[-1])), np.full(scores.shape[:2], -np.inf)
    top = scores.max(-1, keepdims=True)
    weight = np.exp(scores - top)
    total = weight.sum(-1, keepdims=True)
    return weight / total @ values, (top + np.log(total))[..., 0]


B, K, R, T, D = 4, 2, 3, 24, 5
NOTHING = slice(0, 0)
TASKS = [
    (0, [slice(0, 5), slice(5, 6)]),
    (0, [slice(6, 24), NOTHING]),
    (2, [NOTHING, slice(0, 24)]),
    (3, [slice(0, 8), slice(8, 16)]),
    (3, [slice(16, 20), slice(20, 24)]),
    (0, [NOTHING, NOTHING]),  # to spare
]


def draw(spread):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((B, K, R, T)) - 10 * np.arange(B)[:, None, None, None]
    return spread * scores, rng.standard_normal((B, K, T, D))


@pytest.fixture(params=[1, 100])
def joined(request):
    """Scores, values, parts and what they join to; row 1 has no task."""
    scores, values = draw(request.param)
    parts = parts_of(scores, values, TASKS)
    rows = np.array([row for row, _ in TASKS], np.int32)
    return scores, values, parts, jax.jit(_join, static_argnums=3)(*parts, rows, B)


def test_joined_tasks_are_the_softmax_of_the_whole(joined):
    """Catches parts of other rows, and sums that overflow or that leave float32."""
    scores, values, _, (out, lse) = joined
    for row in (0, 2, 3):
        want_out, want_lse = softmax(scores[row], values[row])
        assert_close(out[row], want_out, 1e-5)
        assert_close(lse[row], want_lse, 1e-6)
    assert not np.asarray(out[1]).any()
    assert (np.asarray(lse[1]) == -np.inf).all()


def test_joined_tasks_are_merged(joined):
    *_, (outs, sums), (out, _) = joined
    for row in (0, 2, 3):
        mine = [n for n, (of, _) in enumerate(TASKS) if of == row]
        parts = [(outs[n, w].swapaxes(1, 2)[None], sums[n, w][None]) for n in mine for w in (0, 1)]
        assert_close(out[row], merge(jax.tree.map(jnp.asarray, parts))[0], 1e-6)
