"""`benchmark engine`: its workloads, the figures of a small model's runs, and its tables."""

import argparse
import json

import pytest

from benchmarks import write_tables
from jaxmoe.benchmarks import engine, tables
from jaxmoe.benchmarks.cpu import MODEL
from jaxmoe.benchmarks.engine_run import Run
from jaxmoe.benchmarks.timing import today
from jaxmoe.benchmarks.workloads import PREFIX, requests_of
from jaxmoe.errors import UserError
from jaxmoe.generation.request import Request


def arguments(*words):
    parser = argparse.ArgumentParser()
    engine.add_parser(parser.add_subparsers())
    return parser.parse_args(["engine", *map(str, words)])


@pytest.fixture(scope="module")
def figures(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("figures") / "engine.json"
    words = "--workload", "lognormal", "--requests", 4, "--rows", 2, "--rounds", 2
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAXMOE_ORACLE_PYTHON", raising=False)
        engine.run_engine(arguments(small.checkpoint, *words, "--output", path))
    return json.loads(path.read_text())


def test_lognormal_is_the_known_workload():
    """Catches another order of the draws, and tokens from random numbers of their own: 14,539."""
    requests = requests_of("lognormal", MODEL.vocab_size)
    assert len(requests) == 64
    assert sum(request.length for request in requests) - 64 == 15_107
    assert requests == requests_of("lognormal", MODEL.vocab_size)
    assert requests[:3] == requests_of("lognormal", MODEL.vocab_size, 3)


def test_prefixes_share_their_prefix():
    assert len(requests_of("prefixes", 100)) == 100
    requests = requests_of("prefixes", 100, 300)
    assert len({request.tokens[:PREFIX] for request in requests}) == 1
    own = [len(request.tokens) - PREFIX for request in requests]
    answers = [request.max_new_tokens for request in requests]
    assert (min(own), max(own), min(answers), max(answers)) == (8, 60, 16, 64)
    assert len({request.tokens for request in requests}) == 300


def test_long_prompts_and_short_answers():
    requests = requests_of("long", 100, 300)
    lengths = [len(request.tokens) for request in requests]
    assert 1000 <= min(lengths) < 1050 and 2950 < max(lengths) <= 3000
    assert {request.max_new_tokens for request in requests} == set(range(1, 17))


@pytest.mark.slow
def test_figures(figures):
    (workload,) = figures["workloads"]
    (side,) = workload["engine"]
    assert (figures["model"], figures["date"], figures["rounds"]) == ("checkpoint", today(), 2)
    assert workload["transformers"] is None and "times_faster" not in side
    assert workload["real_tokens"] == workload["prompt_tokens"] + workload["answer_tokens"] - 4
    in_vain = sum(side["drafted"]) - sum(side["accepted"])
    assert side["tokens"] == workload["real_tokens"] + in_vain  # no row went on in vain
    assert len(side["seconds"]) == 2 and side["rows"] == 2
    assert side["slots_a_token"] >= 1
    assert side["steps"] >= (workload["answer_tokens"] - sum(side["accepted"])) / 2
    assert side["step_programs"] >= 2  # steps that read prompts and steps that only write
    assert side["first_run_seconds"] > max(side["seconds"])  # it compiled


@pytest.mark.slow
def test_times_are_of_what_they_say(figures):
    side = figures["workloads"][0]["engine"][0]
    first, admitted = side["first_token_seconds"], side["after_admission_seconds"]
    assert 0 < admitted["median"] < first["median"] < first["p90"] < max(side["seconds"])
    assert admitted["p90"] < first["p90"]  # the last requests waited for a row
    assert 0 < side["host_seconds_a_step"] < max(side["seconds"]) / side["steps"]


def run(seconds, answers):
    return Run(
        seconds, answers, [0.5, 1.5], [0.5, 0.25], [0.001, 0.003], 60, 40, 20, [3, 1], [2, 1]
    )


@pytest.fixture
def compared():
    """Figures by hand: 10 tokens in 2 seconds, which took transformers 4; one answer differs."""
    requests = [Request("a", (5,), 4), Request("b", (6,), 6)]
    answers = {"b": [2] * 6, "a": [1] * 4}
    theirs = {"answers": [[1] * 4, [3] * 6], "seconds": 4.0, "torch": "2", "transformers": "5"}
    first = {"first_run_seconds": 9.0, "step_programs": 3}
    runs = [run(1.0, answers), run(2.0, answers), run(3.0, answers)]
    return engine.compared({8: (first, runs)}, [theirs], requests)


def test_beside_transformers(compared):
    (side,) = compared["engine"]
    assert side["tokens_per_second"] == 5 and side["slots_a_token"] == 1.5
    assert side["times_faster"] == 2 and side["identical"] == 0.5
    assert side["first_token_seconds"] == {"median": 1.0, "p90": 1.5}
    assert side["host_seconds_a_step"] == 0.002
    assert side["answer_tokens_a_step"] == 0.5
    assert (side["drafted"], side["accepted"]) == ([3, 1], [2, 1])
    assert compared["transformers"]["tokens_per_second"] == 2.5


@pytest.mark.slow
def test_tables_hold_the_figures(figures, compared):
    workload = {"workload": "long", "requests": 2, "prompt_tokens": 1234, "answer_tokens": 10}
    figures = {**figures, "workloads": [{**workload, **compared}]}
    ours = ["long, 8 rows", "5.0", "2.0", "1.00 (1.50)", "1.50", "67%, 100%", "2.0", "3"]
    grid = tables.engine_grid(figures)
    assert grid.rows == [ours, ["long, transformers", "2.5", *[""] * 6]]
    markdown = write_tables.engine_markdown(figures)
    assert f"| {' | '.join(ours)} |" in markdown
    text = " ".join(markdown.split())
    assert "batches of 8" in text and "50% or more of the answers are the same tokens" in text
    assert "long: 2 requests, 1,234 tokens of prompts and 10 of answers." in text


def test_tables_without_transformers(figures):
    assert tables.engine_grid(figures).rows[0][2] == ""
    assert "generate" not in write_tables.engine_markdown(figures)


def test_the_document_has_no_table_without_figures(monkeypatch, tmp_path):
    monkeypatch.setattr(write_tables, "ROOT", tmp_path)
    text = "<!-- engine -->\n\n<!-- /engine -->\n"
    assert write_tables.filled(text) == text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--rows", 8, 0), "^--rows 0 is below 1.$"),
        (("--rounds", 0), "^--rounds 0 is below 1.$"),
        (("--requests", 0), "^--requests 0 is below 1.$"),
        (("--step-tokens", -1), "^--step-tokens -1 is below 1.$"),
        (("nowhere",), "nowhere"),
    ],
)
def test_mistakes(words, says):
    with pytest.raises(UserError, match=says):
        engine.run_engine(arguments(*words))
