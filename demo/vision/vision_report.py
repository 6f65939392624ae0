"""Questions about held-out digits, and what the demo model that sees makes of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from demo.vision import digit_pictures
from demo.vision.digit_pictures import LAYOUTS, QUESTIONS, Drawing

PICTURES = 600  # of held-out digits
SEED = 1
EXAMPLES = ((1, 2), (2, 2), (3, 1))  # layouts of the pictures in the repository
BEGIN = "<!-- vision, written by scripts/make_vision_model.py -->\n"
END = "<!-- end of vision -->\n"
Record = dict[str, Any]


def write_questions(folder: Path) -> None:
    """Pictures of held-out digits, and the questions about them with and without the pictures."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng, source = np.random.default_rng(SEED), digit_pictures.digits(held_out=True)
    lines = []
    for i in range(PICTURES):
        drawing = digit_pictures.draw_any(rng, source)
        drawing.image.save(folder / f"{i}.png")
        kinds = ["read", ("largest", "count")[i % 2]]
        lines += [question(f"{i}.png", drawing, kind) for kind in kinds]
    _write_lines(folder / "questions.jsonl", lines)
    _write_lines(folder / "blind.jsonl", map(without_picture, lines))


def write_examples(folder: Path) -> None:
    """A few more pictures of held-out digits, with all questions."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng, source = np.random.default_rng(SEED + 1), digit_pictures.digits(held_out=True)
    lines = []
    for layout in EXAMPLES:
        file = f"{layout[0]}x{layout[1]}.png"
        drawing = digit_pictures.draw(rng, source, layout, one_tile=False)
        drawing.image.save(folder / file)
        lines += [question(file, drawing, kind) for kind in QUESTIONS]
    _write_lines(folder / "questions.jsonl", lines)


def question(file: str, drawing: Drawing, kind: str) -> Record:
    """A line for `jaxmoe evaluate answers`."""
    rows, columns = len(drawing.rows), len(drawing.rows[0])
    return {
        "id": f"{file} {kind}",
        "group": f"{kind}, {rows} x {columns}" if kind == "read" else kind,
        "messages": [digit_pictures.question_about(file, QUESTIONS[kind][0])],
        "answer": drawing.answer(kind),
    }


def without_picture(line: Record) -> Record:
    """The line of `question` with its text alone, to see what a model answers by guessing."""
    _, text = line["messages"][0]["content"]
    return line | {"messages": [{"role": "user", "content": text["text"]}]}


def _write_lines(path: Path, lines) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def answers(checkpoint: Path, questions: Path) -> Record:
    """What `jaxmoe evaluate answers` reports."""
    report = questions.with_suffix(".report.json")
    command = [sys.executable, "scripts/evaluate.py", "answers", checkpoint, questions]
    subprocess.run([*map(str, command), "--dtype", "float32", "--json", str(report)], check=True)
    return json.loads(report.read_text())


def baselines() -> Record:
    """The share of held-out digits, cut out, that simple classifiers of their 64 pixels get."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import NearestCentroid

    training, held_out = (digit_pictures.digits(x) for x in (False, True))
    flat = [x.images.reshape(-1, 64) for x in (training, held_out)]
    models = {
        "nearest_centroid": NearestCentroid(),
        "logistic_regression": LogisticRegression(max_iter=5000),
    }
    return {
        name: float(model.fit(flat[0], training.labels).score(flat[1], held_out.labels))
        for name, model in models.items()
    }


def measure(checkpoint: Path, folder: Path, examples: Path) -> Record:
    """All numbers of a model."""
    training, held_out = (len(digit_pictures.digits(x).labels) for x in (False, True))
    return {
        "training_digits": training,
        "held_out_digits": held_out,
        "pictures": PICTURES,
        "seeing": answers(checkpoint, folder / "questions.jsonl")["summary"],
        "blind": answers(checkpoint, folder / "blind.jsonl")["summary"],
        "baselines": baselines(),
        "examples": _examples(answers(checkpoint, examples / "questions.jsonl"), examples),
    }


def _examples(report: Record, folder: Path) -> list[Record]:
    keys = ("id", "expected", "text")
    (folder / "questions.report.json").unlink()
    return [{key: record[key] for key in keys} for record in report["answers"]]


def reading(summary: list[Record]) -> Record:
    """The counts of all questions what is written."""
    lines = [line for line in summary if line["group"].startswith("read")]
    names = ("questions", "right", "characters", "characters_right")
    return {name: sum(line[name] for line in lines) for name in names}


def with_numbers(readme: str, metrics: Record) -> str:
    """The README with its numbers replaced."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + numbers(metrics) + END + rest.split(END)[1]


def numbers(metrics: Record) -> str:
    """The README's tables and pictures."""
    blind = {line["group"]: line for line in metrics["blind"]}
    order = [f"read, {rows} x {columns}" for rows, columns in LAYOUTS] + ["largest", "count"]
    seeing = {line["group"]: line for line in metrics["seeing"]}
    rows = "".join(_row(name, seeing[name], blind[name]) for name in order)
    total, unseen = (reading(metrics[key]) for key in ("seeing", "blind"))
    rows += _row("**read, all**", total, unseen)
    simple = metrics["baselines"]
    return f"""
| question | asked | right | per digit | right without the picture |
|---|---:|---:|---:|---:|
{rows}
| digits, one at a time | right |
|---|---:|
| this model, digits in pictures | {_share(total["characters_right"], total["characters"])} |
| logistic regression of 64 pixels, digits cut out | {simple["logistic_regression"]:.1%} |
| nearest centroid, digits cut out | {simple["nearest_centroid"]:.1%} |

{metrics["parameters"]:,} parameters; {metrics["training_digits"]:,} digits to train on, \
{metrics["held_out_digits"]} held out, of which {metrics["pictures"]} pictures were made.

{_pictures(metrics["examples"])}
"""


def _row(name: str, seen: Record, blind: Record) -> str:
    right, unseen = (_share(x["right"], x["questions"]) for x in (seen, blind))
    by_digit = _share(seen["characters_right"], seen["characters"])
    return f"| {name} | {seen['questions']} | {right} | {by_digit} | {unseen} |\n"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}"


def _pictures(examples: list[Record]) -> str:
    """A table of pictures, each with what the model says of it."""
    files: dict[str, list[str]] = {}
    for record in examples:
        file, kind = record["id"].split()
        said = record["text"].strip().replace("\n", "<br>")
        files.setdefault(file, []).append(f"{QUESTIONS[kind][0]} **{said}**")
    lines = [
        f"| ![{file}](vision/held-out/{file}) | {'<br>'.join(files[file])} |" for file in files
    ]
    return "| picture | what the model says |\n|---|---|\n" + "\n".join(lines)
