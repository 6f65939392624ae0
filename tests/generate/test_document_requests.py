"""Requests after a document, side by side: as if each were asked with the whole text before it."""

import jax
import numpy as np
import pytest

from jaxmoe.generation.document import new_document, read
from jaxmoe.generation.engine import Request, generate
from jaxmoe.generation.sampling import Sampling
from jaxmoe.mesh import MeshConfig
from tests import tiny
from tests.conftest import load_tiny, one_device
from tests.tiers import slow

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    """A local and a global layer; the text is shorter than a chunk, or longer."""
    config = tiny.scout_like(
        num_hidden_layers=2, no_rope_layer_interval=2, attention_chunk_size=request.param
    )
    return load_tiny(tmp_path_factory.mktemp("asked"), config, tiny.random_tensors(config, 5))


def answers(stream):
    found = {}
    for request, token, _ in stream:
        found.setdefault(request.id, []).append(token)
    return found


@pytest.mark.parametrize(
    ("model", "mesh", "rows"),
    slow((16, None, 8), (8192, None, 1), (8192, "data=2,sequence=2,tensor=2", 4)),
    indirect=["model"],
)
def test_questions_side_by_side(model, mesh, rows):
    rng = np.random.default_rng(0)
    text = tuple(rng.integers(0, 120, 100).tolist())
    questions = [tuple(rng.integers(0, 120, n).tolist()) for n in (3, 70, 1, 20, 9)]
    questions.append((*questions[1][:65], 7))  # begins as another does
    alone = [Request(i, (*text, *question), 9) for i, question in enumerate(questions)]
    asked = [Request(i, question, 9) for i, question in enumerate(questions)]
    with jax.set_mesh(one_device()):
        stream = generate(model.config, model.params, alone, GREEDY, stop_ids=())
        expected = answers(stream)
    mesh = MeshConfig.parse(mesh).make() if mesh else one_device()
    with jax.set_mesh(mesh):
        params = model.on(mesh)
        document = new_document(model.config, params, len(text) + 4 * 128)
        *_, document = read(model.config, params, document, text, prefill_chunk=64)
        options = {"rows": rows, "stop_ids": (), "document": document}
        assert answers(generate(model.config, params, asked, GREEDY, **options)) == expected
