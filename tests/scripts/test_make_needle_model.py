"""make_needle_model.py: rows are the task, a killed run goes on, the README is the JSON's."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from demo.needle import make_needle_model, needle_data, needle_training
from jaxmoe.checkpoint import store
from jaxmoe.eval import needle_report
from jaxmoe.eval.needle import is_found
from tests.conftest import one_device

CHUNK = 8192


@pytest.fixture(scope="module")
def task():
    return needle_data.Task(make_needle_model.make_tokenizer(), CHUNK)


def test_the_committed_tokenizer_is_the_scripts(task):
    committed = json.loads((make_needle_model.DEMO / "model" / "tokenizer.json").read_text())
    assert committed == json.loads(task.tokenizer.backend.to_str())


@pytest.mark.parametrize("length", [64, 1024, 8192])
def test_rows_ask_for_the_key_that_they_tell(task, length):
    for step in range(8):
        rows = task.rows(0, step, 2, length)
        for tokens, answer in zip(rows.tokens, rows.answer, strict=True):
            assert len(tokens) == length
            text = task.tokenizer.decode(tokens.tolist())
            key = text.split("The pass key is ")[1][: needle_data.DIGITS]
            assert is_found(key, task.tokenizer.decode(tokens[answer == 1].tolist()))
            assert text.count(key) == 2  # told, and answered
            assert answer[-needle_training.TAIL] == 0  # the loss looks at no more


def test_positions_grow_and_the_needle_stays_whole(task):
    apart = []
    for step in range(40):
        rows = task.rows(0, step, 4, 128)
        assert rows.positions.min() >= 0
        assert rows.positions.max() < needle_data.LONGEST
        gaps = np.diff(rows.positions)
        assert (gaps >= 1).all()
        told = np.array(
            [_find(tokens, task.tokenizer.encode(" pass key is")) for tokens in rows.tokens]
        )
        for row, start in enumerate(told):
            assert (gaps[row, start : start + 8] == 1).all()
            apart.append(rows.positions[row, start] // CHUNK < rows.positions[row, -10] // CHUNK)
        assert (gaps[:, -15:] == 1).all()
    assert 0.5 < np.mean(apart) < 0.95


def _find(tokens, part):
    """Where the first occurrence is."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(part))
    return int(np.argmax((windows == part).all(1)))


def test_rows_follow_from_the_seed_and_the_step(task):
    same, again, other = (task.rows(0, step, 2, 64) for step in (3, 3, 4))
    np.testing.assert_array_equal(same.tokens, again.tokens)
    assert (same.tokens != other.tokens).any()


@pytest.fixture
def model(task, monkeypatch) -> dict:
    monkeypatch.setattr(needle_training, "STAGES", (needle_training.Stage(3, 64, 1),))
    monkeypatch.setattr(needle_training, "LOG_EVERY", 1)
    monkeypatch.setattr(needle_training, "SAVE_EVERY", 1)
    return make_needle_model.model_config(task.tokenizer) | {"num_hidden_layers": 2}


@pytest.mark.slow
def test_a_killed_run_takes_the_same_steps(task, model, tmp_path):
    mesh, words = one_device(), tmp_path / "words"
    words.mkdir()
    task.tokenizer.save(words)

    def train(name):
        config = needle_training.run_config(model, words, tmp_path / name, seed=0)
        return needle_training.train(config, task, mesh)

    with jax.set_mesh(mesh):
        list(train("whole"))
        for record in train("killed"):
            if record["step"] == 2:
                break
        records = list(train("killed"))
    assert [record["step"] for record in records] == [2, 3]
    assert {"loss", "right", "router_peak", "length"} < set(records[-1])
    want, got = (store.load(tmp_path / name / "checkpoint", mesh) for name in ("whole", "killed"))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_readme_is_made_from_the_json():
    folder = Path(make_needle_model.DEMO)
    readme = (folder / "README.md").read_text()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert readme == needle_report.with_numbers(readme, metrics)
    assert metrics["summary"] == needle_report.summary(metrics["trials"])
