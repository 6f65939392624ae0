"""Drafts in lines, as steps on GPUs have them: several tokens of a row share one."""

import jax
import numpy as np
import pytest

from jaxmoe.generation import batches, drafts
from jaxmoe.generation.batches import Sizes, make_batch
from jaxmoe.generation.request import Request
from jaxmoe.generation.rows import Row
from tests.conftest import one_device
from tests.generate.test_drafts import compare, few_letters, mesh_of
from tests.tiers import TIMES, with_more_workloads


@pytest.fixture
def in_lines(monkeypatch):
    """Steps as on GPUs, where up to four tokens of a row share a line."""
    for module in (batches, drafts):
        monkeypatch.setattr(module, "line_of", lambda config, platform: 4)


@pytest.mark.slow
def test_answers_in_lines_are_the_same(llm_model, in_lines):
    """Both rows work, and have drafts beside each other."""
    rng = np.random.default_rng(0)
    options = {"count": 4, "waits": False, "rows": 2, "settings": few_letters}
    with jax.set_mesh(one_device()):
        right, tried = compare(llm_model.config, llm_model.params, rng, **options)
    assert 0 < right < tried


@pytest.mark.slow
@pytest.mark.runs_long
@pytest.mark.parametrize(
    ("spec", "kv", "rows"),
    [
        (None, "int8", 16),
        ("data=2,expert=2,sequence=2", None, 8),
        *with_more_workloads((None, None, 3), ("sequence=2,tensor=4", None, 8)),
    ],
)
def test_answers_of_all_kinds_in_lines_are_the_same(llm_model, in_lines, spec, kv, rows):
    rng, right, tried = np.random.default_rng(rows), 0, 0
    options = {"rows": rows, "kv": kv, "within": 1e-3 if kv else 1e-5, "waits": kv is None}
    with jax.set_mesh(mesh_of(spec)):
        params = llm_model.on(jax.sharding.get_mesh()) if spec else llm_model.params
        for _ in range(TIMES * 6):
            more = compare(llm_model.config, params, rng, **options)
            right, tried = right + more[0], tried + more[1]
    assert 0 < right < tried


def test_a_row_with_drafts_fills_a_line():
    """Another has a line too, and what is left of the lines is padding."""
    given = {"parent": None, "fed": 1, "written": 1}
    request = Request("a", (5,), 20)
    rows = [
        Row((5,), request, answer=[7], drafts=(8, 9), adapter=2, **given),
        Row((5,), request, answer=[6], **given),
        None,
    ]
    batch = make_batch([rows], Sizes(3, 16, 256, 3, line=4), 10, 1)
    tokens, positions, segments = batch.inputs
    assert tokens.tolist() == [[7, 8, 9, 1], [6, 1, 1, 1], [1, 1, 1, 1]]
    assert positions.tolist() == [[11, 12, 13, 0], [11, 0, 0, 0], [0, 0, 0, 0]]
    assert segments.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.packing.row[:2, 0].tolist() == [0, 1]
    assert batch.packing.single is None
    assert batch.adapter[0, :3].tolist() == [2, 2, 2]
    assert batch.slots[0, :4].tolist() == [0, 1, 2, 4]
    assert batch.targets[0, :5].tolist() == [0, 0, 0, 1, 3]
    assert batch.drafts[0, :5].tolist() == [-1, 8, 9, -1, -1]
    assert batch.real == 4
    rows[0].drafts = ()
    again = make_batch([rows], Sizes(3, 16, 256, 3, line=4), 10, 1)
    assert again.inputs.tokens.shape == (3, 1)
