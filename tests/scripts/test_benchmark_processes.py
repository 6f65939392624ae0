"""Processes of a benchmark prepare together and time apart."""

import itertools
import os
import time

import pytest

from jaxmoe.benchmarks import processes
from jaxmoe.benchmarks.processes import FRACTION, batches, run_each, run_in_turn

WORK = 0.3  # seconds


def timed(item):
    """When the item was prepared, and when its timing began and ended."""
    time.sleep(WORK * item)
    prepared = time.monotonic()
    with processes.alone():
        begin = time.monotonic()
        time.sleep(WORK)
        return item, prepared, begin, time.monotonic(), os.environ.get(FRACTION)


def test_times_in_turn_when_all_are_prepared():
    items = [0, 3, 1]
    found = list(run_in_turn(timed, items, [2**30] * 3, 40 * 2**30, 3))
    assert [x[0] for x in found] == items
    spans = sorted(x[2:4] for x in found)
    assert [float(x[4]) for x in found] == pytest.approx([0.75 * 6 / 40] * 3)
    assert spans[0][0] >= max(x[1] for x in found)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_one_process_is_this_one():
    assert [x[0] for x in run_in_turn(timed, [0, 1], [1, 1], 0, 1)] == [0, 1]
    assert list(run_each(lambda x: x + 1, [1, 2], 1)) == [2, 3]


def test_results_of_several_processes_are_in_order():
    assert list(run_each(abs, [-3, -1, -2], 2)) == [3, 1, 2]


def test_batches_fit_into_memory():
    """Also what fits with nothing else: the suite left it out if it cannot run alone either."""
    assert batches([10, 10, 10, 11, 99, 1], 30, 9) == [[0, 1, 2], [3], [4], [5]]
    assert batches([0] * 5, 0, 2) == [[0, 1], [2, 3], [4]]
