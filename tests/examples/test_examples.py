"""Every example of examples/ runs, on two layers of the demo model, and is short."""

import inspect
import json
import shutil
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file

from examples import batch, chat, document, evaluation, picture, plan, score, structured, text
from jaxmoe.checkpoint.convert import convert

DEMO = Path(__file__).parents[2] / "demo/model"
SEES = DEMO.parent / "vision"
GENESIS = "In the beginning God created the heaven and the earth. " * 8


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Examples take all devices, and compiling for eight would take most of the time."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A local and a global layer, which compile in seconds; what they say makes no sense."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(DEMO, folder / "hf")
    config = json.loads((DEMO / "config.json").read_text())
    layers = {"num_hidden_layers": 2, "no_rope_layers": [1, 0], "moe_layers": [0, 1]}
    config = {key: value for key, value in config.items() if key != "layer_types"} | layers
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    tensors = load_file(DEMO / "model.safetensors")
    kept = {
        name: x for name, x in tensors.items() if not any(f".{n}." in name for n in range(2, 8))
    }
    save_file(kept, folder / "hf" / "model.safetensors")
    convert(folder / "hf", folder / "checkpoint")
    return str(folder / "checkpoint")


EXAMPLES = [batch, chat, document, evaluation, picture, plan, score, structured, text]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_short(example):
    assert len(inspect.getsource(example).splitlines()) <= 42


def test_text(checkpoint, capsys):
    text.main(checkpoint)
    assert len(capsys.readouterr().out.split()) > 5


def test_chat(checkpoint, capsys):
    chat.main(checkpoint, ["Who made the earth?"])
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_picture(tmp_path, capsys):
    convert(SEES / "model", tmp_path / "checkpoint")
    questions = ["What is written?", "How many digits are there?"]
    picture.main(str(tmp_path / "checkpoint"), str(SEES / "held-out/1x2.png"), questions)
    assert capsys.readouterr().out.splitlines() == [f"{questions[0]} 33", f"{questions[1]} 2"]


def test_document(checkpoint, tmp_path, capsys):
    (tmp_path / "genesis.txt").write_text(GENESIS)
    document.main(checkpoint, str(tmp_path / "genesis.txt"), str(tmp_path / "document"))
    *progress, first, second = capsys.readouterr().out.splitlines()
    assert progress and first.startswith(" And God said ") and second.startswith(" And it was ")


def test_batch(checkpoint, tmp_path):
    messages = [{"role": "user", "content": "And the earth?"}]
    lines = [{"prompt": "In the"}, {"messages": messages}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    batch.main(checkpoint, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert [record["id"] for record in records] == ["0", "1"]
    assert all(record["text"] for record in records)


def test_evaluation(checkpoint, capsys):
    evaluation.main(checkpoint)
    lines = capsys.readouterr().out.splitlines()
    whole, cached = (float(line.split()[-1]) for line in lines)
    assert whole > 1 and abs(whole - cached) < 1e-3 * whole


def test_score(checkpoint, capsys):
    score.main(checkpoint)
    sense, nonsense = capsys.readouterr().out.splitlines()
    assert sense.startswith("perplexity ") and sense.endswith("created the heaven")
    assert float(sense.split()[1].rstrip(",")) > 1 and nonsense != sense


def test_structured(checkpoint, capsys):
    structured.main(checkpoint)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and any(line.startswith("{'name': ") for line in lines)


def test_plan(capsys):
    plan.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["h100x8", "h200x8", "v5p-16"]
    assert all(" GB a device fits" in line for line in lines)
