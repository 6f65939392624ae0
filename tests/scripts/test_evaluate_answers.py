"""evaluate.py answers: what is right is counted, by group, and mistakes are one line."""

import json

import pytest

from jaxmoe.cli import evaluate_answers
from jaxmoe.errors import UserError
from jaxmoe.eval.answers import grade, summary
from tests.scripts import FOLDER, refuses, succeeds

DEMO = FOLDER.parent / "demo" / "vision"
TEXT = {"id": 1, "prompt": "In the", "answer": "7"}


@pytest.mark.parametrize(
    ("text", "right", "characters"),
    [
        ("37\n14", True, 4),
        ("37\n14\n", True, 4),
        ("3714", False, 4),
        ("37\n19", False, 3),
        ("7\n14", False, 0),
        ("", False, 0),
    ],
)
def test_an_answer_is_graded_whole_and_by_character(text, right, characters):
    graded = grade("37\n14", text)
    assert graded == {"right": right, "characters": 4, "characters_right": characters}


def test_groups_are_counted_and_summed():
    records = [{"group": g} | grade("12", t) for g, t in (("b", "12"), ("a", "13"), ("b", ""))]
    first, second, both = summary(records)
    assert first == {"group": "b", "questions": 2, "right": 1, **counts(4, 2)}
    assert second == {"group": "a", "questions": 1, "right": 0, **counts(2, 1)}
    assert both == {"group": "all", "questions": 3, "right": 1, **counts(6, 3)}
    assert [x["group"] for x in summary(records[:1])] == ["b"]


def counts(characters, right):
    return {"characters": characters, "characters_right": right}


@pytest.mark.slow
def test_pictures_and_a_line_that_is_refused(tmp_path):
    model = tmp_path / "model"
    succeeds("convert.py", DEMO / "model", model)
    lines = [json.loads(x) for x in (DEMO / "held-out" / "questions.jsonl").open()]
    for line in lines:
        image = line["messages"][0]["content"][0]
        image["image"] = str(DEMO / "held-out" / image["image"])
    lost = {"role": "user", "content": [{"type": "image", "image": "lost.png"}]}
    lines.append({"id": "lost", "group": "lost", "messages": [lost], "answer": "5"})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = "--dtype", "float32", "--json", tmp_path / "report.json"
    printed, errors = succeeds(
        "evaluate.py", "answers", model, tmp_path / "questions.jsonl", *flags
    )
    assert f"1 of {len(lines)} questions have no answer" in errors and "lost.png" in errors
    assert "read, 2 x 2" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    expected = json.loads((DEMO / "metrics.json").read_text())["examples"]
    found = {record["id"]: record["text"] for record in report["answers"]}
    assert found == {record["id"]: record["text"] for record in expected} | {"lost": ""}
    assert report["summary"][-1]["questions"] == len(lines)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": None}, 'no "answer" that is text'),
        ({"answer": 7}, 'no "answer" that is text'),
        ({"n": 2}, 'or "n"'),
        ({"group": 1}, "no text"),
    ],
)
def test_a_line_without_one_right_answer_is_named(tmp_path, change, words):
    lines = [TEXT, TEXT | {"id": 2} | change]
    (tmp_path / "q.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=rf"q\.jsonl line 3 has .*{words}"):
        evaluate_answers.read_expected(tmp_path / "q.jsonl")


def test_a_checkpoint_without_tokenizer_is_named(small, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps(TEXT))
    flags = small.checkpoint, tmp_path / "q.jsonl"
    refuses("evaluate.py", "answers", *flags, words=[small.checkpoint, "no tokenizer"])
