"""plan.py: a table, JSON, a picture, and every mistake in one line."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import plan_table
from jaxmoe.cli import plan
from jaxmoe.errors import UserError
from jaxmoe.plan.work import TASKS
from tests import tiny
from tests.scripts import refuses, succeeds


@pytest.fixture
def planned(monkeypatch, capsys):
    """What the script prints: a process for each case would take a minute."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, args)])
        plan.main()
        return capsys.readouterr().out

    return run


def test_json_in_a_process_of_its_own():
    args = "--context", 10_000_000, "--kv", "int8", "--json"
    stdout, stderr = succeeds("plan.py", "scout", "--target", "h100x8", *args)
    found = json.loads(stdout)
    assert stderr == ""
    assert found["fits"] and found["mesh"] == "tensor=8"
    assert found["peak_bytes"] < 60 * 2**30
    parts = found["formula"]
    assert sum(parts[x] for x in ("weights", "cache", "optimizer", "temporaries")) == parts["peak"]
    assert found["free_bytes"] == found["target"]["limit"] - found["peak_bytes"]
    seconds = found["seconds"]
    assert seconds["step"] == seconds[seconds["binds"]] == seconds["token"]
    assert found["compiled"] is None


def test_json_is_complete_for_each_task(planned):
    keys = None
    for task in TASKS:
        found = json.loads(planned("scout", "--target", "v5p-64", "--task", task, "--json"))
        assert keys in (None, list(found))
        keys = list(found)
        assert found["task"] == task and found["fits"]


def test_a_table_and_a_picture(planned, tmp_path):
    picture = tmp_path / "memory.png"
    args = "--context", 8_000_000, "--png", picture
    text = planned("scout", "--target", "h100x8", *args)
    for word in ("tensor=8", "weights", "cache", "temporaries", "binds", "It fits", "75.19"):
        assert word in text
    with Image.open(picture) as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 16)}
        assert image.format == "PNG" and image.width > 600
    assert {(0x3B, 0x6E, 0xA5), (0xE0, 0x8A, 0x3C)} <= colors  # weights and cache


@pytest.mark.parametrize(
    "options, least",
    [
        (["h100x1", "--weights", "int4", "--kv", "int4"], 1_400_000),
        (["h200x1", "--weights", "int4", "--kv", "int8"], 3_000_000),
        (["h200x1", "--weights", "int4", "--kv", "int4"], 6_000_000),
    ],
)
def test_the_largest_contexts_on_one_gpu(planned, options, least):
    found = json.loads(planned("scout", "--json", "--target", *options))
    assert found["context"] == found["largest_context"] >= least


def test_a_folder_with_a_config(planned, tmp_path):
    config = tiny.scout_like(max_position_embeddings=4096)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = json.loads(planned(tmp_path, "--target", "h100x1", "--json"))
    assert found["context"] == 4096


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, words",
    [
        (["scout", "--target", "h100x8", "--context", "20000000"], ["20000000", "10485760"]),
        (["scout", "--target", "h100x8", "--context", "many"], ["--context many"]),
        (["scout", "--target", "v100x8"], ["'v100x8'", "h100x8", "v6e-64"]),
        (["gpt", "--target", "h100x8"], ["'gpt'", "scout", "maverick"]),
        (["scout", "--target", "h100x8", "--mesh", "tensor=4"], ["tensor=4", "8 device"]),
        (["scout", "--target", "h100x8", "--mesh", "tensor=-1,data=3"], ["data=3", "8 device"]),
        (["scout", "--target", "v6e-16", "--mesh", "tensor=16"], ["tensor=16", "divide"]),
        (["maverick", "--target", "h100x8"], ["GiB more", "no context fits", "holds it"]),
        (
            ["scout", "--target", "h100x8", "--context", "100000", "--mesh", "sequence=8"],
            ["sequence=8", "GiB more", "--target h100x8 --mesh tensor=8 holds it"],
        ),
    ],
)
def test_mistakes(planned, capsys, args, words):
    with pytest.raises(UserError) as caught:
        planned(*args)
    assert capsys.readouterr().out == ""
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_mistake_ends_with_one_line():
    refuses("plan.py", "scout", "--target", "h100x9", words=["h100x9"])


def test_the_document_is_made_from_the_figures():
    plans = json.loads(plan_table.FIGURES.read_text())
    text = Path(plan_table.DOCUMENT).read_text()
    assert text == plan_table.filled(text, plans)
    named = [(x["model"], x["target"]["name"], x["weights"], x["kv"], x["task"]) for x in plans]
    assert named == [(*case[:4], case[5]) for case in plan_table.PLANS]
    assert all(plan["fits"] for plan in plans)
