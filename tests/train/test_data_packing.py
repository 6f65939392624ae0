"""Packing and the order of rows."""

import bisect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.errors import UserError
from jaxmoe.train.packing import BLOCK, Order, Pieces, best_fit, cut, pack_rows

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=80)


def one_by_one(sizes, capacity):
    """The rooms of the rows after best-fit decreasing, a piece at a time."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        place = bisect.bisect_left(rooms, size)
        room = rooms.pop(place) if place < len(rooms) else capacity
        bisect.insort(rooms, room - size)
    return rooms


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(40, 100))
def test_packing_is_best_fit_decreasing(sizes, capacity):
    rows = best_fit(np.array(sizes), capacity)
    used = np.bincount(rows, weights=sizes)
    assert sorted(capacity - used) == one_by_one(sizes, capacity)


@settings(max_examples=50, deadline=None)
@given(SIZES, st.integers(0, 3))
def test_every_piece_is_whole_in_one_row(sizes, seed):
    sizes = np.array(sizes)
    start = np.arange(len(sizes)) * 100
    pieces = Pieces(np.arange(len(sizes)), start, start + sizes)
    rows = pack_rows(pieces, sizes, 40, (seed,))
    again = pack_rows(pieces, sizes, 40, (seed,))
    np.testing.assert_array_equal(rows.pieces.document, again.pieces.document)
    assert sorted(rows.pieces.document) == list(range(len(sizes)))
    for i in range(len(rows)):
        row = rows[i]
        assert 0 < (row.stop - row.start).sum() <= 40
        np.testing.assert_array_equal(row.start, start[row.document])
        np.testing.assert_array_equal(row.stop - row.start, sizes[row.document])


def test_pieces_of_one_size_are_mixed_by_the_seed():
    pieces = Pieces(*[np.arange(100)] * 3)
    orders = [pack_rows(pieces, np.full(100, 10), 20, (s,)).pieces.document for s in (0, 1)]
    assert (orders[0] != orders[1]).any() and (np.diff(orders[0]) != 1).any()


LENGTHS = np.array([3, 8, 17, 20])
WHOLE = np.array([True, True, True, False])


@pytest.mark.parametrize(
    ("too_long", "expected"),
    [
        ("drop", [(0, 0, 3), (1, 0, 8)]),
        ("truncate", [(0, 0, 3), (1, 0, 8), (2, 0, 8)]),
        ("split", [(0, 0, 3), (1, 0, 8), (2, 0, 8), (2, 8, 16), (2, 16, 17)]),
    ],
)
def test_long_documents_are_cut_as_asked(too_long, expected):
    pieces = cut(LENGTHS, 8, too_long, WHOLE)
    assert list(zip(pieces.document, pieces.start, pieces.stop, strict=True)) == expected


def places(order, count):
    return [order.at(i) for i in range(count)]


def test_an_epoch_has_every_row_once_in_another_order():
    rows = [row for _, row in places(Order([7], [1.0], seed=0), 21)]
    epochs = [rows[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows != [row for _, row in places(Order([7], [1.0], seed=1), 21)]


def test_the_order_is_a_function_of_the_place():
    """So a run that resumes, with any number of hosts, takes the same steps."""
    counts, weights = [5, 9], [2.0, 1.0]
    first = places(Order(counts, weights, 3), 60)
    for start in (59, 0, 31):
        resumed = Order(counts, weights, 3)
        assert [resumed.at(i) for i in range(start, 60)] == first[start:]


def test_sources_are_mixed_by_weight_and_each_goes_through_its_epochs(monkeypatch):
    monkeypatch.setattr("jaxmoe.train.packing.BLOCK", 16)
    found = places(Order([5, 3], [3.0, 1.0], seed=0), 48)
    sources = [source for source, _ in found]
    for block in (sources[:16], sources[16:32], sources[32:]):
        assert block.count(0) == 12 and block.count(1) == 4
    assert sources[:16] != sources[16:32]
    for source, count in ((0, 5), (1, 3)):
        rows = [row for s, row in found if s == source]
        for start in range(0, len(rows) - count, count):
            assert sorted(rows[start : start + count]) == list(range(count))


def test_a_source_of_no_share_is_refused():
    Order([1, 1], [1.0, 1 / (BLOCK - 1)], seed=0)
    with pytest.raises(UserError, match="less than 1/65536 of all"):
        Order([1, 1], [1.0, 0.1 / BLOCK], seed=0)
