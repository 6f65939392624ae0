"""A document of 20,000 tokens, as transformers reads and continues it; chunks of 8,192."""

import jax
import numpy as np
import pytest

from jaxmoe.eval.logits import token_logits
from jaxmoe.generation.engine import Request, generate
from jaxmoe.generation.sampling import Sampling
from jaxmoe.generation.saved_document import load_document, read_document
from jaxmoe.mesh import MeshConfig
from tests import tiny
from tests.conftest import load_tiny

pytestmark = pytest.mark.runs_long


@pytest.fixture(scope="module")
def golden():
    return tiny.read_golden("long/document")


@pytest.fixture(scope="module")
def model(golden, tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("document"), golden.config, golden.tensors())


@pytest.mark.slow
def test_one_forward_pass(golden, model):
    logits = token_logits(model.config, model.params, golden.tokens)[:, golden.first_row :]
    assert abs(logits - golden.logits).max() < 1e-4


@pytest.mark.slow
def test_read_and_continued(golden, model, tmp_path):
    """Interrupted in the third chunk, read to its end on a mesh, and asked on one device.

    Its last tokens are the question, so that there is one.
    """
    text, question = golden.tokens[0, :-16], tuple(golden.tokens[0, -16:].tolist())
    arguments = {"prefill_chunk": 3000, "interval": 8192}
    for count in read_document(model.config, model.params, text, tmp_path / "text", **arguments):
        if count > 17_000:
            break
    mesh = MeshConfig.parse("sequence=8").make()
    with jax.set_mesh(mesh):
        params = model.on(mesh)
        told = list(read_document(model.config, params, text, tmp_path / "text", **arguments))
    assert told[0] == 16_384
    new = golden.greedy.shape[1]
    document = load_document(tmp_path / "text", model.config, model.params, len(question) + new)
    stream = generate(
        model.config,
        model.params,
        [Request("0", question, new)],
        Sampling(temperature=0.0),
        stop_ids=(),
        document=document,
    )
    np.testing.assert_array_equal([token.token for token in stream], golden.greedy[0])
