"""`benchmark step`: the figures of a small model's steps, and mistakes in one sentence."""

import argparse
import json

import pytest

from benchmarks import write_tables
from jaxmoe.benchmarks import step, tables
from jaxmoe.benchmarks.timing import today
from jaxmoe.errors import UserError
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = tiny.scout_like(num_hidden_layers=4, no_rope_layer_interval=2)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def arguments(model, *words):
    parser = argparse.ArgumentParser()
    step.add_parser(parser.add_subparsers())
    return parser.parse_args(["step", model, *map(str, words)])


@pytest.fixture(scope="module")
def figures(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("figures") / "step-cpu.json"
    words = "--layers", 2, "--context", 32, "--prefill-chunk", 16, "--mesh", "data=8"
    step.run_step(arguments(model, *words, "--weights", "int8", "--profile", "--output", path))
    return json.loads(path.read_text())


def test_figures(figures):
    (batch,) = figures["batches"]
    assert (figures["layers"], figures["weights"], figures["date"]) == (2, "int8", today())
    assert batch["finite"] and len(batch["prefill"]["seconds"]) == 2
    assert batch["prefill"]["first"] > batch["prefill"]["seconds"][0]  # it compiled
    assert "bound" not in batch["decode"]  # of a device that no plan knows
    assert [x["task"] for x in figures["profiles"]] == ["decode", "prefill"]


def test_tables_hold_the_figures(figures):
    rows = [{"name": "a_kernel", "microseconds": 60.0, "calls": 2}]
    rows.append({"name": "small", "microseconds": 0.5, "calls": 1})
    figures["batches"] = [{
        "rows": 8, "prefill_chunk": 1024, "prefill": {"seconds": [9, 0.5], "bound": 0.25},
        "decode": {"seconds": 0.002, "bound": 0.001, "estimate": 0.0015},
    }]  # fmt: skip
    figures["profiles"] = [
        {"task": "decode", "rows": 8, "busy_microseconds": 100.0, "launches": 3, "kernels": rows}
    ]
    row = ["8", "16,384", "50%", "2.00", "1.50", "4,000.0"]
    assert tables.step_grid(figures).rows == [row]
    markdown = write_tables.step_markdown("step-h100.json", figures)
    assert f"| {' | '.join(row)} |" in markdown
    assert "| a | 2 | 60 | 60% |" in markdown and "small" not in markdown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--context", 0), "context 0"),
        (("--context", 32, "--prefill-chunk", 0), "prefill chunk 0"),
        (("--context", 32, "--prefill-chunk", 5), "32 is no multiple of --prefill-chunk 5"),
        (("--layers", 5), "--layers 5 is not between 1 and 4"),
        (("--context", 32, "--batch", 0), "rows 0"),
    ],
)
def test_mistakes(model, words, says):
    with pytest.raises(UserError, match=says):
        step.run_step(arguments(model, *words))
