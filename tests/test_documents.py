"""The README's code runs, and its figures are those of the committed JSON."""

import asyncio
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import write_tables
from jaxmoe.checkpoint.convert import convert

ROOT = Path(__file__).parent.parent


def test_tables_are_made_from_the_json():
    readme = (ROOT / "README.md").read_text()
    assert readme == write_tables.filled(readme)
    assert json.loads((ROOT / "benchmarks" / "cpu.json").read_text())["same_tokens"]


@pytest.mark.slow
def test_snippets_run_as_they_are_written(tmp_path, monkeypatch, capsys):
    """After `make demo`, in a folder with its `build`."""
    convert(ROOT / "demo" / "model", tmp_path / "build" / "demo")
    monkeypatch.chdir(tmp_path)
    first, *others = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(first.strip().splitlines()) <= 6
    names: dict = {}
    exec(compile(first, "README.md", "exec"), names)
    assert len(capsys.readouterr().out.split()) > 3
    for code in others:
        exec(compile(code, "README.md", "exec"), names)
    assert names["logits"].shape == (1, names["tokens"].size, names["config"].vocab_size)
    assert names["out"].shape == (2, 8, 1, 128) and jnp.isfinite(names["out"]).all()


@pytest.mark.slow
def test_the_page_on_python_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    convert(ROOT / "demo" / "model", tmp_path / "build" / "demo")
    monkeypatch.chdir(tmp_path)
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    names: dict = {}
    for code in re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL
    ):
        exec(compile(code, "python.md", "exec"), names)
    assert len(asyncio.run(names["answer"]("In the"))) == 2
    assert len(names["several"]) == 3 and names["result"].error is None
    assert capsys.readouterr().out
