"""`jaxmoe benchmark train`: figures of both sides; transformers' are those of a fake."""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import write_tables
from jaxmoe.benchmarks import cpu, train
from jaxmoe.hf_config import from_hf
from tests import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def figures(monkeypatch):
    model = tiny.scout_like(hidden_size=16, intermediate_size=16, bos_token_id=0)
    monkeypatch.setattr(cpu, "MODEL", from_hf(model, "test"))

    def run_script(python, name, model, rows, *flags):
        assert (python, name, flags) == ("python", "hf_train_speed.py", ("--repeats", 2))
        assert (model / "config.json").exists() and np.load(rows).shape == (2, 8)
        return {"seconds": [1e3, 2e3], "loss": 4.0, "torch": "1", "transformers": "2"}

    monkeypatch.setattr(train, "run_script", run_script)
    given = argparse.Namespace(layers=1, batch_size=2, length=8, rounds=2, repeats=2)
    return train.benchmark_train(given, "python")


def test_figures_of_both_sides(figures):
    seconds = figures["median_seconds"]
    assert figures["repeats"] == 4 and seconds["transformers"] == 1500
    assert figures["times_faster"] == pytest.approx(1500 / seconds["jaxmoe"])
    assert figures["tokens_per_second"]["transformers"] == pytest.approx(16 / 1500)
    assert 3 < figures["losses"]["jaxmoe"] < 7  # of 128 tokens, at random
    console = Console(file=io.StringIO(), width=100)
    console.print(train.train_table(figures))
    assert "1500.00" in console.file.getvalue()


def test_the_document_has_the_measured_figures():
    measured = json.loads((ROOT / "benchmarks" / "train-cpu.json").read_text())
    text = (ROOT / "docs" / "training.md").read_text()
    assert write_tables.filled(text) == text and write_tables.train_markdown(measured) in text
    assert measured["losses"]["jaxmoe"] == pytest.approx(measured["losses"]["transformers"])
