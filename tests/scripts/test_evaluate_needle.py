"""evaluate.py needle: the committed model finds its key, and every mistake is one line."""

import argparse
import json
import math

import numpy as np
import pytest

from jaxmoe.checkpoint.convert import convert
from jaxmoe.cli import evaluate_needle
from jaxmoe.errors import UserError
from jaxmoe.eval import needle_report
from jaxmoe.text import Tokenizer
from tests import tiny
from tests.conftest import load_tiny
from tests.scripts import FOLDER, refuses, succeeds

MODEL = FOLDER.parent / "demo" / "needle" / "model"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("needle") / "checkpoint"
    convert(MODEL, folder)
    return folder


@pytest.fixture
def unhurried(monkeypatch):
    """Scripts compile as users' do: long computations take twice as long as tests compile them."""
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
def test_the_needle_model_finds_its_key(unhurried, checkpoint, tmp_path):
    """At one chunk, and at two, where only the global layer sees the needle."""
    output, png = tmp_path / "needle.json", tmp_path / "needle.png"
    flags = "--lengths", "2k,16k", "--depths", 2, "--check-exact", "--json", output, "--png", png
    printed, _ = succeeds("evaluate.py", "needle", checkpoint, *flags)
    assert "2,048" in printed and "16,384" in printed and "100%" in printed
    report = json.loads(output.read_text())
    assert len(report["trials"]) == 4
    for trial in report["trials"]:
        assert trial["found"], trial
        assert trial["same_greedy"]
        assert trial["max_logit_difference"] < 1e-4
        low, high = trial["depth"]
        assert low * trial["length"] - 40 < trial["needle_at"] < high * trial["length"]
    assert [line["found_by_depth"] for line in report["summary"]] == 2 * [[1, 1]]
    assert png.read_bytes().startswith(b"\x89PNG")
    again = arguments(checkpoint=checkpoint, lengths="2k,16k", depths="2", json=str(output))
    evaluate_needle.main(again)  # nothing is left to run
    assert json.loads(output.read_text())["trials"] == report["trials"]


def test_a_model_that_has_not_learned_finds_nothing(tmp_path):
    """And is exact all the same: the two are reported apart."""
    known = json.loads((MODEL / "config.json").read_text())
    ids = {key: known[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    config = tiny.maverick_like(num_hidden_layers=2, no_rope_layer_interval=2, **ids)
    model = load_tiny(tmp_path, config, tiny.random_tensors(config, 0))
    Tokenizer.load(MODEL).save(model.checkpoint)
    output = tmp_path / "needle.json"
    flags = "--lengths", 80, "--depths", "0,100", "--check-exact", "--json", output
    succeeds("evaluate.py", "needle", model.checkpoint, *flags)
    (line,) = json.loads(output.read_text())["summary"]
    assert (line["found"], line["trials"], line["same_greedy"]) == (0, 2, 2)
    assert line["max_logit_difference"] < 1e-4


def test_an_unknown_checkpoint_is_named(tmp_path):
    refuses("evaluate.py", "needle", tmp_path / "nowhere", words=[tmp_path / "nowhere"])


def trial(length, depth, found, **more):
    return {"length": length, "depth": list(depth), "found": found, "seconds": 1.0} | {
        "host_peak_bytes": 2**20,
        **more,
    }


def arguments(**changes):
    """What the parser gives, in-process: a process for each mistake would take a minute."""
    parser = argparse.ArgumentParser()
    evaluate_needle.add_parser(parser.add_subparsers())
    args = parser.parse_args(["needle", str(changes.pop("checkpoint"))])
    return argparse.Namespace(**{**vars(args), **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lengths": "512k"}, "524288 tokens"),
        ({"lengths": "20"}, "20 tokens is too short"),
        ({"lengths": "8q"}, "--lengths 8q"),
        ({"lengths": "0"}, "--lengths 0"),
        ({"depths": "x"}, "--depths x"),
        ({"depths": "0"}, "--depths 0"),
        ({"depths": "0,101"}, "--depths 0,101"),
        ({"trials": 0}, "--trials 0"),
        ({"prefill_chunk": 0}, "--prefill-chunk 0"),
        ({"haystack": "nowhere.txt"}, "nowhere.txt"),
        ({"png": "nowhere/map.png"}, "nowhere/map.png"),
    ],
)
def test_mistakes(checkpoint, changes, words):
    with pytest.raises(UserError) as caught:
        evaluate_needle.main(arguments(checkpoint=checkpoint, **changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_tokenizer_is_named(small):
    with pytest.raises(UserError, match="no tokenizer") as caught:
        evaluate_needle.main(arguments(checkpoint=small.checkpoint))
    assert small.checkpoint in str(caught.value)


def test_contexts_do_not_depend_on_the_other_cases(checkpoint):
    """So a run of one length can be added to a run of the others."""
    tokenizer, args = Tokenizer.load(checkpoint), arguments(checkpoint=checkpoint)
    depths = evaluate_needle.read_depths("10")
    many = evaluate_needle.make_cases([100, 200], depths, 2)
    made = dict(zip(many, evaluate_needle.make_needles(many, tokenizer, args), strict=True))
    few = evaluate_needle.make_cases([200], depths[3:4], 2)
    assert [made[case] for case in few] == evaluate_needle.make_needles(few, tokenizer, args)
    assert len({needle.key for needle in made.values()}) > 35


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no file of an earlier run"),
        ('{"trials": [{}]}', "is no file of an earlier run"),
        (json.dumps({"trials": [trial(200, (0.5, 0.5), True, trial=0, key="1")]}), "another seed"),
    ],
)
def test_a_file_of_another_run_is_not_continued(checkpoint, tmp_path, content, words):
    path = tmp_path / "needle.json"
    path.write_text(content)
    changes = {"lengths": "200", "depths": "50,50", "json": str(path)}
    with pytest.raises(UserError, match=words) as caught:
        evaluate_needle.main(arguments(checkpoint=checkpoint, **changes))
    assert str(path) in str(caught.value)
    assert path.read_text() == content


def test_a_haystack_file_is_the_filler(checkpoint, tmp_path):
    path = tmp_path / "hay.txt"
    path.write_text("zebra\n\nzebra\tzebra")
    args = arguments(checkpoint=checkpoint, haystack=str(path))
    case = evaluate_needle.Case(200, (0.5, 0.5), 0)
    tokenizer = Tokenizer.load(checkpoint)
    (needle,) = evaluate_needle.make_needles([case], tokenizer, args)
    text = tokenizer.decode(needle.prompt)
    filler = (" zebra" * 100).find(text[:20])  # begins at a random token of it
    assert 0 <= filler < len(" zebra") and "river" not in text
    assert f"The pass key is {needle.key}." in text


def test_lengths_and_depths():
    assert evaluate_needle.read_lengths("1k, 300,1M") == [1024, 300, 2**20]
    assert evaluate_needle.read_depths("2") == [(0.0, 0.5), (0.5, 1.0)]
    assert evaluate_needle.read_depths("0,12.5") == [(0.0, 0.0), (0.125, 0.125)]


def test_the_summary_counts_by_length_and_depth():
    first, second = (0.0, 0.5), (0.5, 1.0)
    exact = {"max_logit_difference": 1e-6, "same_greedy": True}
    records = [
        trial(10, first, True, **exact),
        trial(10, first, False, **exact),
        trial(10, second, True, max_logit_difference=0.5, same_greedy=False),
        trial(20, first, False),
        trial(20, second, True),
    ]
    short, long = needle_report.summary(records)
    assert (short["found"], short["trials"], short["found_by_depth"]) == (2, 3, [1, 1])
    assert (short["max_logit_difference"], short["same_greedy"]) == (0.5, 2)
    assert (long["found"], long["found_by_depth"]) == (1, [0, 1])
    assert "same_greedy" not in long


def test_the_heat_map_has_a_cell_for_each_length_and_depth(tmp_path):
    from PIL import Image

    depths = [(0.0, 0.5), (0.5, 1.0)]
    records = [trial(10, depths[0], True), trial(10, depths[1], False), trial(20, depths[0], True)]
    records.append(trial(20, depths[1], True))
    needle_report.write_png(str(tmp_path / "map.png"), records)
    image = Image.open(tmp_path / "map.png").convert("RGB")
    (width, height), left, top = needle_report.CELL, needle_report.LEFT, needle_report.TOP
    corners = [image.getpixel((left + width * x + 3, top + 3)) for x in range(2)]
    corners.append(image.getpixel((left + width + 3, top + height + 3)))
    green, red = needle_report.GREEN, needle_report.RED
    for pixel, want in zip(corners, (green, red, green), strict=True):
        assert math.dist(pixel, want) < 10
    assert np.asarray(image).shape[0] > top + 2 * height
