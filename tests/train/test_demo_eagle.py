"""The committed draft head is the one that demo/eagle/metrics.json and demo/README.md speak of."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from demo.eagle.make_head import COUNT, TEMPERATURES, snippet, with_numbers
from jaxmoe import LLM
from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import convert
from jaxmoe.checkpoint.heads import convert_head, load_head
from jaxmoe.cli import devices, generate
from jaxmoe.cli import evaluate as command
from jaxmoe.errors import UserError
from jaxmoe.eval.drafts import LOW, measure
from jaxmoe.generation.sampling import Sampling
from tests.conftest import one_device
from tests.scripts import succeeds, together

ROOT = Path(__file__).parents[2]
EAGLE = ROOT / "demo" / "eagle"
METRICS = json.loads((EAGLE / "metrics.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The demo model and its head, converted."""
    folder = tmp_path_factory.mktemp("demo")
    convert(ROOT / "demo" / "model", folder / "model")
    convert_head(EAGLE / "head", folder / "head", folder / "model")
    return folder


@pytest.mark.slow
def test_the_snippet_is_drafted_as_the_metrics_say(folders, monkeypatch):
    monkeypatch.chdir(ROOT)
    mesh = one_device()
    config, params = store.load(folders / "model", mesh, "float32")
    head = load_head(folders / "head", mesh, config, "float32")
    with jax.set_mesh(mesh):
        found = measure(config, params, head, snippet(), TEMPERATURES, COUNT)
    for one, known in zip(found, METRICS["snippet"], strict=True):
        np.testing.assert_allclose(one.accepted, known["accepted"], atol=2e-3)


@pytest.mark.slow
def test_it_drafts_what_the_demo_model_says(folders, monkeypatch):
    """The same text in fewer steps, by the function and by the command."""
    monkeypatch.setattr("jaxmoe.generation.drafts.OVERHEAD", 100)  # drafts are always worth while
    prompt, sampling = "And it came to pass", Sampling(temperature=0.0, ignore_eos=True)
    wanted = {"max_new_tokens": 80, "sampling": sampling}
    options = {"dtype": "float32", "rows": 1}
    (plain,) = LLM(folders / "model", drafts=0, **options).generate(prompt, **wanted)
    (found,) = LLM(folders / "model", head=folders / "head", **options).generate(prompt, **wanted)
    assert found.tokens == plain.tokens and plain.drafted == ()
    assert len(found.drafted) == 3 and sum(found.accepted) > 30
    flags = ["--prompt", prompt, "--max-new-tokens", 80, "--temperature", 0, "--ignore-eos"]
    flags += ["--dtype", "float32", "--rows", 1, "--cpu-devices", 1]
    flags += ["--head", folders / "head", "--drafts", 2]
    text, _ = succeeds("generate.py", folders / "model", *flags)
    assert text.rstrip("\n") == plain.text


def test_heads_of_other_models_are_refused(folders, small, monkeypatch):
    """Before the model is loaded."""
    monkeypatch.setattr(devices, "start", lambda args: None)
    command = ["generate", small.checkpoint, "--prompt", "a", "--head", folders / "head"]
    monkeypatch.setattr("sys.argv", [str(word) for word in command])
    with pytest.raises(UserError, match="hidden_size 192, but its target has 64"):
        generate.main()
    monkeypatch.setattr("jaxmoe.checkpoint.store.load", None)
    with pytest.raises(UserError, match="hidden_size 192, but its target has 64"):
        LLM(small.checkpoint, head=folders / "head")


def test_the_head_is_small_and_its_numbers_are_in_the_readme():
    assert sum(path.stat().st_size for path in (EAGLE / "head").iterdir()) < 2 * 10**6
    readme = (ROOT / "demo" / "README.md").read_text()
    assert with_numbers(readme, METRICS) == readme


@pytest.mark.slow
def test_the_command_tells_of_other_layers(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = json.loads((ROOT / "demo" / "metrics.json").read_text())["snippet"]["text"]
    (tmp_path / "text").write_text(text)
    monkeypatch.setattr(devices, "devices", lambda: jax.devices()[:1])
    flags = ["--text", str(tmp_path / "text"), "--rows", "1", "--length", "64", "--count", "2"]
    flags += ["--json", str(tmp_path / "out.json"), "--compilation-cache", "off"]
    flags = ["drafts", str(folders / "model"), str(folders / "head"), *flags]
    monkeypatch.setattr("sys.argv", ["evaluate", *flags])
    command.main()
    right = json.loads((tmp_path / "out.json").read_text())["drafts"]
    assert [one["temperature"] for one in right] == [0.0, 1.0]
    assert right[0]["accepted"][0] > LOW and "warning" not in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["evaluate", *flags, "--layer-ids", "0,0,0"])
    command.main()
    wrong = json.loads((tmp_path / "out.json").read_text())["drafts"]
    assert wrong[0]["accepted"][0] < right[0]["accepted"][0]
    warned = capsys.readouterr().err
    assert "inputs of layers 0,0,0, and" in warned and "--layer-ids 2,4,5." in warned


@pytest.mark.slow
def test_several_processes_measure_together(folders, tmp_path):
    """Catches a file for which the first process waits for the others, which have ended."""
    (tmp_path / "text").write_text("And God saw that it was good, and it was so. " * 20)
    flags = ["--text", tmp_path / "text", "--rows", 2, "--length", 48, "--count", 2]
    flags += ["--mesh", "data=2", "--cpu-devices", 1, "--json", tmp_path / "out.json"]
    command = ["evaluate.py", "drafts", folders / "model", folders / "head", *flags]
    codes, _, said = together.ends(together.start_together(2, *command, JAXMOE_WATCHDOG="60"))
    assert codes == [0, 0], said
    assert len(json.loads((tmp_path / "out.json").read_text())["drafts"]) == 2
