"""The README's code runs, and its figures are those of the committed JSON."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tables

from jaxmoe.checkpoint.convert import convert

ROOT = Path(__file__).parent.parent


def test_tables_are_made_from_the_json():
    readme = (ROOT / "README.md").read_text()
    assert readme == tables.filled(readme)
    assert json.loads((ROOT / "benchmarks" / "cpu.json").read_text())["same_tokens"]


def test_ten_lines_of_python(tmp_path, monkeypatch, capsys):
    convert(ROOT / "demo" / "model", tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert len(code.strip().splitlines()) <= 11
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 3


def test_kernels_on_their_own():
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[2]
    rows, d = 2, 64
    q, k, v = (jnp.ones((rows, heads, 16, d)) for heads in (4, 2, 2))
    names = {"rows": rows, "d": d, "q": q, "k": k, "v": v, "q1": q[:, :, :1]}
    names["lengths"] = jnp.array([16, 5])
    exec(compile(code, "README.md", "exec"), names)
    np.testing.assert_allclose(names["out"], 1.0, rtol=1e-6)
