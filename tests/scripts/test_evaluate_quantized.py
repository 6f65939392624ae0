"""evaluate.py quantized: every format is measured, against the model as it is."""

import json

import numpy as np
import pytest

from jaxmoe.checkpoint.convert import convert
from jaxmoe.cli import evaluate_quantized
from tests.scripts import FOLDER, refuses, succeeds


@pytest.mark.slow
def test_a_model(tmp_path):
    convert(FOLDER.parent / "demo" / "model", tmp_path / "checkpoint")
    (tmp_path / "text").write_text("And the king said unto the people, Go up. " * 40)
    flags = "--text", tmp_path / "text", "--rows", 2, "--length", 100
    flags += "--dtype", "float32", "--json", tmp_path / "out.json"
    succeeds("evaluate.py", "quantized", tmp_path / "checkpoint", *flags)
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["tokens"] == 200
    errors = {(each["part"], each["format"]): each["logit_error"] for each in report["results"]}
    assert len(errors) == 7 and all(0 < error < 0.2 for error in errors.values())
    assert errors["cache", "int8"] < errors["cache", "int4"] < errors["matrices", "int4"]
    refused = *flags[:4], "--length", 10**6
    refuses("evaluate.py", "quantized", tmp_path / "checkpoint", *refused, words=["fewer than 2"])


def test_nats():
    logits = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    tokens = np.random.default_rng(1).integers(0, 7, (2, 5))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rows, columns = np.indices((2, 4))
    expected = -np.log(p[rows, columns, tokens[:, 1:]]).mean()
    np.testing.assert_allclose(evaluate_quantized.nats(logits, tokens), expected, rtol=1e-5)
