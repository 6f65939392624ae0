"""evaluate.py loops: what a continuation repeats is counted, and mistakes are one line."""

import json

import pytest

from jaxmoe.checkpoint.convert import convert
from jaxmoe.cli import evaluate_loops
from jaxmoe.errors import UserError
from tests.scripts import FOLDER, refuses, succeeds


@pytest.mark.slow
def test_a_model(tmp_path):
    convert(FOLDER.parent / "demo" / "needle" / "model", tmp_path / "checkpoint")
    flags = "--max-new-tokens", 60, "--temperatures", "0,1", "--ignore-stop"
    flags += "--prompt", "The river runs", "--json", tmp_path / "loops.json"
    printed, _ = succeeds("evaluate.py", "loops", tmp_path / "checkpoint", *flags)
    assert "seen" in printed
    report = json.loads((tmp_path / "loops.json").read_text())
    assert [line["temperature"] for line in report["summary"]] == [0.0, 1.0]
    for record in report["continuations"]:
        assert record["tokens"] == 60
        assert record["prompt"] == "The river runs"
        assert record["text"]
        assert set(record["seen_ngrams"]) == {"4", "8", "16", "32"}


def test_a_loop_is_measured():
    measured = evaluate_loops.measure([9, 8, 7] + 20 * [1, 2])
    assert measured["loop_period"] == 2
    assert measured["loop_length"] == 40
    assert measured["repeated_suffix"] == 38
    assert measured["seen_ngrams"]["4"] == pytest.approx(1 - 5 / 40)  # 3 unlike, 2 of the loop


def test_the_summary_leaves_out_what_is_too_short():
    short, long = ({"temperature": 0.0, "tokens": n} for n in (10, 40))
    records = [short | evaluate_loops.measure(list(range(10)))]
    records.append(long | evaluate_loops.measure(40 * [5]))
    (line,) = evaluate_loops.summary(records)
    assert line["seen_ngrams"]["32"] == pytest.approx(8 / 9)
    assert line["seen_ngrams"]["4"] == pytest.approx((0 + 36 / 37) / 2)
    assert (line["continuations"], line["tokens"], line["end_in_a_loop"]) == (2, 50, 1)
    assert line["longest_repeated_suffix"] == 39


@pytest.mark.parametrize("temperatures", ["x", "0,,1", "nan", "-1"])
def test_temperatures_must_be_numbers(temperatures):
    with pytest.raises(UserError, match="temperature"):
        evaluate_loops.read_samplings(temperatures, 0.9, 0)


def test_a_checkpoint_without_tokenizer_is_named(small):
    refuses("evaluate.py", "loops", small.checkpoint, words=[small.checkpoint, "no tokenizer"])
