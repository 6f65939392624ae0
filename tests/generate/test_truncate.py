"""`truncate`: a cache from which tokens were dropped is as if they had never been there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.generation.document import Document, new_document, read, truncate
from jaxmoe.generation.engine import Request, generate
from jaxmoe.generation.sampling import Sampling
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.kv_cache import PAGE, init_cache, round_capacity
from jaxmoe.model.steps import Inputs, last_logits, prefill, step
from tests import reference, tiny
from tests.conftest import load_tiny, one_device

KEPT, DROPPED = 20, 6  # of chunks of 16 tokens: what is dropped is of the second, as the last kept
NEXT = KEPT + 3  # a position from which some of the dropped tokens would be seen


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One local and one global layer."""
    config = tiny.scout_like(num_hidden_layers=2, no_rope_layer_interval=2, hidden_size=32)
    return load_tiny(tmp_path_factory.mktemp("truncate"), config, tiny.random_tensors(config, 3))


@pytest.mark.parametrize("spec", ["data=1", "sequence=2,tensor=4"])
def test_dropped_tokens_are_not_seen(model, spec):
    mesh = one_device() if spec == "data=1" else MeshConfig.parse(spec).make()
    text = np.random.default_rng(0).integers(0, 120, KEPT + DROPPED + 1).tolist()
    with jax.set_mesh(mesh):
        config, params = model.config, model.on(mesh)
        empty = new_document(config, params, 64)
        *_, document = read(config, params, empty, text[: KEPT + DROPPED])
        cache = truncate(document.cache, jnp.array([KEPT]))
        assert cache.length.tolist() == [KEPT]
        new = Inputs(*(jnp.full((1, 1), x) for x in (text[-1], NEXT, 1)))
        got, _ = step(config, params, new, cache, readout=last_logits)
    seen, positions = [[*text[:KEPT], text[-1]]], [[*range(KEPT), NEXT]]
    want = reference.logits(model.hf_config, model.tensors, seen, positions=positions)
    assert abs(np.asarray(got[0]) - want[0, -1]).max() < 1e-4


@pytest.mark.parametrize("spec", ["data=1", "data=2,sequence=2,tensor=2"])
def test_each_row_drops_its_own(model, spec):
    """One row takes all its tokens back but 20, the other none."""
    mesh = one_device() if spec == "data=1" else MeshConfig.parse(spec).make()
    held = KEPT + DROPPED
    texts = np.random.default_rng(1).integers(0, 120, (2, held + 1))
    lengths = [KEPT, held]
    with jax.set_mesh(mesh):
        config, params = model.config, model.on(mesh)
        cache = init_cache(config, 2, round_capacity(64))
        *_, (_, _, cache) = prefill(config, params, texts[:, :-1], cache, chunk=32)
        cache = truncate(cache, jnp.array(lengths))
        positions = jnp.array([[NEXT], [held]])
        new = Inputs(jnp.asarray(texts[:, -1:]), positions, jnp.ones((2, 1), jnp.int32))
        got, _ = step(config, params, new, cache, readout=last_logits)
    for text, length, position, ours in zip(texts, lengths, positions, got, strict=True):
        seen, places = [[*text[:length], text[-1]]], [[*range(length), int(position[0])]]
        want = reference.logits(model.hf_config, model.tensors, seen, positions=places)
        assert abs(np.asarray(ours) - want[0, -1]).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["data=1", "sequence=2,tensor=4"])
def test_pages_without_tokens_are_free_again(tmp_path, spec):
    """The scheduler counts on them: without, requests after the document would lose tokens."""
    mesh = one_device() if spec == "data=1" else MeshConfig.parse(spec).make()
    hf_config = tiny.scout_like(
        num_hidden_layers=2, no_rope_layer_interval=2, hidden_size=32, attention_chunk_size=512
    )
    model = load_tiny(tmp_path, hf_config, tiny.random_tensors(hf_config, 3))
    text = np.random.default_rng(0).integers(0, 120, 500).tolist()
    requests = [Request(i, (i,), 180, Sampling(temperature=0.0)) for i in range(2)]
    answers = []
    with jax.set_mesh(mesh):
        params = model.on(mesh)
        for length in 500, 70:
            *_, document = read(
                model.config, params, new_document(model.config, params, 512), text[:length]
            )
            cache = truncate(document.cache, jnp.array([70]))
            assert sum((pool.owner == 0).sum() for pool in cache.pools) == 2 * -(-70 // PAGE)
            chosen = {0: [], 1: []}
            for request, token, _ in generate(
                model.config, params, requests, requests[0].sampling,
                document=Document(cache, 70), stop_ids=(),
            ):  # fmt: skip
                chosen[request.id].append(token)
            answers.append(chosen)
    assert answers[0] == answers[1]
    assert all(len(tokens) == 180 for tokens in answers[0].values())
