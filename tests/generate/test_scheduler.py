"""Admission, without a model: who gets a row, beside whom, and that all are served in the end."""

import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.generation.batches import MOST_PIECES, Sizes
from jaxmoe.generation.prefixes import find_prefixes
from jaxmoe.generation.request import Request
from jaxmoe.generation.rows import FreePages
from jaxmoe.generation.scheduler import Scheduler
from jaxmoe.model.kv_cache import PAGE
from jaxmoe.model.kv_cache.full import FullCache


def scheduler_of(requests, *, groups=1, rows=4, holders=4, pages=1000, budget=64):
    free = [FreePages((FullCache(),), (pages,), 1) for _ in range(groups)]
    scheduler = Scheduler(free, rows, holders, Sizes(rows, budget, 16), padding=0)
    scheduler.add(requests, find_prefixes(requests))
    return scheduler


def served(scheduler, after_step=lambda groups: None):
    """The ids in the order in which they ended; a step is read after the next was made."""
    ended, unread, idle = [], [], 0
    while scheduler.busy or unread:
        _, batch = scheduler.next_batch()
        after_step([group.rows for group in scheduler._groups])
        unread.append(batch)
        if batch is None or len(unread) > 1:
            old = unread.pop(0)
            for _, _, row, written in old.writers if old else ():
                row.seen(0, written)
                if row.known == row.request.max_new_tokens:
                    ended.append(row.request.id)
        idle = idle + 1 if batch is None else 0
        unread = [x for x in unread if x is not None]
        assert idle < 5, "nothing goes on"
    return ended


def prompts(count, begin, own, rng=None):
    rng = rng or np.random.default_rng(0)
    stem = tuple(rng.integers(0, 100, begin).tolist())
    return [stem + (100 + i,) * own for i in range(count)]


def requests_of(texts, new=5):
    return [Request(i, text, new) for i, text in enumerate(texts)]


def test_a_pool_for_one_request_serves_many_that_share_a_prefix():
    """The prefix and a request do not fit together: it leaves, and they read it by themselves."""
    requests = requests_of(prompts(5, 1000, 20))
    pages = -(-requests[0].length // PAGE)
    scheduler = scheduler_of(requests, pages=pages)
    assert sorted(served(scheduler)) == list(range(5))
    assert scheduler._groups[0].free.free == (pages,)


def test_a_request_that_never_fits_is_an_error():
    scheduler = scheduler_of(requests_of(prompts(1, 1000, 20)), pages=3)
    with pytest.raises(UserError, match="no room for request 0"):
        served(scheduler)


def test_many_small_prefixes_leave_no_row_idle():
    """More prefixes than rows to hold them: requests go on without."""
    texts = [text for i in range(60) for text in prompts(2, 80, 5, np.random.default_rng(i))]
    most = []
    scheduler = scheduler_of(requests_of(texts, 30), rows=32, budget=512)
    served(scheduler, lambda groups: most.append(sum(row is not None for row in groups[0][:32])))
    assert max(most) == 32


def test_groups_are_filled_evenly():
    """Also by requests that share a prefix, which each group reads."""
    spread = []
    scheduler = scheduler_of(requests_of(prompts(32, 100, 5), 30), groups=4, rows=16, budget=256)
    served(
        scheduler,
        lambda groups: spread.append([sum(row is not None for row in g[:16]) for g in groups]),
    )
    busiest = max(spread, key=sum)
    assert busiest == [8, 8, 8, 8]


def test_no_reader_is_passed_over_forever():
    """Rows beyond those of one step's pieces have their turn while new requests come in."""
    rng = np.random.default_rng(0)
    texts = [tuple(rng.integers(0, 100, 300).tolist()) for _ in range(4 * MOST_PIECES)]
    scheduler = scheduler_of(requests_of(texts, 1), rows=2 * MOST_PIECES, budget=512)
    ended = served(scheduler)
    assert max(abs(place - id_) for place, id_ in enumerate(ended)) <= 2 * MOST_PIECES


def test_a_step_takes_a_token_of_each_row_that_writes():
    requests = [Request("reads", tuple(range(1, 2000)), 1), Request("writes", (1, 2), 50)]
    scheduler, written = scheduler_of(requests, budget=32), []
    while scheduler.busy:
        _, batch = scheduler.next_batch()
        written.append([row.request.id for _, _, row, _ in batch.writers])
        for _, _, row, count in batch.writers:
            row.seen(0, count)
    assert all("writes" in step for step in written[:50])


def test_without_a_row_for_the_longest_prefix_a_shorter_one_is_shared():
    rng = np.random.default_rng(0)
    short = tuple(rng.integers(0, 100, 5 * PAGE).tolist())
    long = short + tuple(rng.integers(0, 100, 20 * PAGE).tolist())
    stems = [long, long, short, short]
    requests, shared = requests_of([(*stem, 100 + i) for i, stem in enumerate(stems)]), {}

    def after_step(groups):
        rows = (row for row in groups[0] if row and row.request)
        shared.update({r.request.id: len(r.parent.tokens) if r.parent else 0 for r in rows})

    for holders, first in (2, long), (1, short):
        scheduler = scheduler_of(requests, holders=holders)
        assert sorted(served(scheduler, after_step)) == list(range(4))
        assert scheduler._groups[0].free.free == (1000,)
        assert shared == dict(enumerate(map(len, (first, first, short, short))))
