"""How rows are cut into tasks of nearly equal size, and how the tasks' results are joined."""

import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import decode_mosaic
from pallas_kernels.attention.decode_config import DecodeConfig
from pallas_kernels.attention.decode_join import decode_join
from pallas_kernels.attention.decode_mosaic import plan_tasks, task_budget
from tests.pallas_kernels.attention.cases import assert_close
from tests.pallas_kernels.hopper import INTERPRET, no_races

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
    tasks, _ = plan(np.array(blocks, np.int32), int(budget), int(least))
    return list(zip(*(x.tolist() for x in tasks), strict=True))


@every_plan
def test_every_block_is_in_one_task(blocks, budget, least):
    tasks = planned(blocks, budget, least)
    met = [(row, block) for row, begin, end in tasks for block in range(begin, end)]
    assert sorted(met) == [(row, block) for row, n in enumerate(blocks) for block in range(n)]


@every_plan
def test_tasks_are_of_one_size_but_for_the_last_of_a_row(blocks, budget, least):
    """The size that shares all blocks out over the budget less a task a row, or the least."""
    size = max(least, -(-sum(blocks) // max(budget - len(blocks), -(-budget // 2))))
    for row, begin, end in planned(blocks, budget, least):
        assert end - begin == size or end == blocks[row] or begin == end
        assert end - begin <= size


@every_plan
def test_number_of_tasks(blocks, budget, least):
    """Those with blocks keep to the budget; those to spare are of a row that there is."""
    tasks = planned(blocks, budget, least)
    busy = sum(begin < end for _, begin, end in tasks)
    if budget >= 2 * len(blocks):
        assert busy <= budget
    assert all((row, begin) == (0, 0) for row, begin, end in tasks if begin == end)


@every_plan
def test_each_row_knows_its_tasks(blocks, budget, least):
    tasks = planned(blocks, budget, least)
    _, of_row = plan(np.array(blocks, np.int32), int(budget), int(least))
    for row, (first, count) in enumerate(zip(*(x.tolist() for x in of_row), strict=True)):
        mine = tasks[first : first + count]
        assert sum(end - begin for _, begin, end in mine) == blocks[row]
        assert all(of == row for of, _, _ in mine)


def test_few_rows_have_a_task_a_multiprocessor():
    """More cost joining and gain nothing; the tasks of many rows even out."""
    config, cores = DecodeConfig(tasks_per_core=4), 132
    with mock.patch.object(decode_mosaic, "target", lambda: mock.Mock(num_cores=cores)):
        budgets = {rows: task_budget(config, rows, 1) for rows in (1, 16, 17, 64)}
    assert budgets == {1: cores, 16: cores, 17: 4 * cores, 64: 4 * cores}


def softmax(scores, values):
    """Output [K, R, d] and log-sum-exp [K, R]."""
    if not scores.size:
        return np.zeros((*scores.shape[:2], values.shape[-1])), np.full(scores.shape[:2], -np.inf)
    top = scores.max(-1, keepdims=True)
    weight = np.exp(scores - top)
    total = weight.sum(-1, keepdims=True)
    return weight / total @ values, (top + np.log(total))[..., 0]


B, K, R, T, D, QUERIES = 4, 2, 8, 24, 128, 5
CUTS = {0: [2 * i for i in range(13)], 1: [], 2: [0, 24], 3: [0, 8, 8, 24]}  # of keys, into tasks
TASKS = [(row, slice(*cut)) for row, cuts in CUTS.items() for cut in itertools.pairwise(cuts)]
COUNT = [max(0, len(cuts) - 1) for cuts in CUTS.values()]
FIRST = np.cumsum(COUNT) - COUNT


def join(outs, lses):
    """Output [B, K, queries, d] and log-sum-exp [B, K, R], by the kernel."""
    options = {"columns": QUERIES, "dtype": jnp.float32, "interpret": INTERPRET}
    first, count = (np.array(x, np.int32) for x in (FIRST, COUNT))
    with no_races():
        return jax.block_until_ready(
            jax.jit(functools.partial(decode_join, **options))(outs, lses, first, count)
        )


def parts_of(scores, values):
    """Output [N, K, d, R] and log-sum-exp [N, K, R] of `TASKS`, and a spare one of garbage."""
    parts = [softmax(scores[row][..., keys], values[row][:, keys]) for row, keys in TASKS]
    outs, sums = (np.array([part[i] for part in parts], np.float32) for i in (0, 1))
    spare = np.full((1, *outs.shape[1:]), np.nan, np.float32)
    outs, sums = np.concatenate([outs, spare]), np.concatenate([sums, spare[..., 0]])
    return outs.swapaxes(-1, -2), sums


@pytest.mark.hopper
@pytest.mark.parametrize("spread", [1, 100])
def test_joined_tasks_are_the_softmax_of_the_whole(spread):
    """Catches parts of other rows, sums that overflow, and the use of what a spare task holds."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((B, K, R, T)) - 10 * np.arange(B)[:, None, None, None]
    scores, values = spread * scores, rng.standard_normal((B, K, T, D))
    out, lse = join(*parts_of(scores, values))
    for row in (0, 2, 3):
        want_out, want_lse = softmax(scores[row], values[row])
        assert_close(out[row], want_out[:, :QUERIES], 1e-5)
        assert_close(lse[row], want_lse, 1e-6)
    assert not np.asarray(out[1]).any()
    assert (np.asarray(lse[1]) == -np.inf).all()


@pytest.mark.hopper
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_leaves_the_others_bit_equal(bad):
    rng = np.random.default_rng(0)
    outs, lses = parts_of(rng.standard_normal((B, K, R, T)), rng.standard_normal((B, K, T, D)))
    want = join(outs, lses)
    outs[FIRST[2]], lses[FIRST[2]] = bad, bad
    for got, expected in zip(join(outs, lses), want, strict=True):
        np.testing.assert_array_equal(np.delete(got, 2, 0), np.delete(expected, 2, 0))
        assert np.isnan(np.asarray(got[2])).any()
