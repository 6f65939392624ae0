"""What is exported in 8 bits is read by transformers with compressed-tensors."""

import json

import numpy as np
import pytest

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import convert
from jaxmoe.checkpoint.export import export
from jaxmoe.eval.logits import token_logits
from tests import tiny
from tests.conftest import one_device

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("weights", ["fp8", "int8"])
def test_exported_quantized_matrices_are_read_by_transformers(weights, transformers, tmp_path):
    """The same numbers, by compressed-tensors.

    The format also asks for activations rounded to 8 bits, as the FP8 release does and this project
    does not: once transformers does that, and once it is told to widen the matrices instead.
    """
    like = tiny.maverick_like(num_hidden_layers=4)
    tiny.write_checkpoint(tmp_path / "hf", like, tiny.random_tensors(like, 4))
    convert(tmp_path / "hf", tmp_path / "orbax", weights=weights)
    export(tmp_path / "orbax", tmp_path / "exported")
    model, params = store.load(tmp_path / "orbax", one_device())
    tokens = np.random.default_rng(0).integers(0, 120, (2, 50), np.int32)
    ours = token_logits(model, params, tokens)
    rounded = transformers(tmp_path / "exported", tmp_path, tokens, 20)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    config["quantization_config"]["dequantize"] = True
    (tmp_path / "exported" / "config.json").write_text(json.dumps(config))
    theirs = transformers(tmp_path / "exported", tmp_path, tokens, 20)
    assert abs(ours - theirs["full"]).max() < 1e-4
    assert abs(rounded["full"] - theirs["full"]).max() > 1e-2
