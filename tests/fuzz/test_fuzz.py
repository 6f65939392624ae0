"""A few hundred damaged inputs; `python -m tests.fuzz` tries as many as are wanted."""

import pytest

from tests.fuzz.kinds import KINDS
from tests.fuzz.runner import GOOD, run

SLOW = ("checkpoint", "document", "head")  # whole folders are copied, and arrays are loaded


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_input_is_read_right_or_refused(name):
    seeds = range(12 if name in SLOW else 40)
    bad = [outcome for outcome in run(KINDS[name], seeds) if outcome.verdict not in GOOD]
    assert not bad, bad[0]
