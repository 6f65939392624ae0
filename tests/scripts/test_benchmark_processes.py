"""Processes of a benchmark prepare together and time apart."""

import itertools
import time

from jaxmoe.benchmarks import processes
from jaxmoe.benchmarks.processes import CONTEXT_BYTES, batches, run_each, run_in_turn

WORK = 0.3  # seconds


def timed(item):
    """When the item was prepared, and when its timing began and ended."""
    time.sleep(WORK * item)
    prepared = time.monotonic()
    with processes.alone():
        begin = time.monotonic()
        time.sleep(WORK)
        return item, prepared, begin, time.monotonic()


def test_times_in_turn_when_all_are_prepared():
    items = [0, 3, 1]
    found = list(run_in_turn(timed, items, [1, 1, 1], 2**40, 3))
    assert [x[0] for x in found] == items
    spans = sorted(x[2:] for x in found)
    assert spans[0][0] >= max(x[1] for x in found)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_one_process_is_this_one():
    assert [x[0] for x in run_in_turn(timed, [0, 1], [1, 1], 0, 1)] == [0, 1]
    assert list(run_each(lambda x: x + 1, [1, 2], 1)) == [2, 3]


def test_results_of_several_processes_are_in_order():
    assert list(run_each(abs, [-3, -1, -2], 2)) == [3, 1, 2]


def test_batches_fit_into_memory():
    """Also an item that does not fit with anything, which the suite left out if it cannot run."""
    room = 3 * CONTEXT_BYTES + 30
    sizes = [10, 10, 10, 11, 10**12, 1]
    found = batches(list("abcdef"), sizes, room, 9)
    assert ["".join(batch) for batch in found] == ["abc", "d", "e", "f"]
    found = batches(list("abcde"), [0] * 5, 10**15, 2)
    assert ["".join(batch) for batch in found] == ["ab", "cd", "e"]
