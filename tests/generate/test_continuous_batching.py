"""Random workloads: whatever runs beside a request, its answer is the model's own continuation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.eval.logits import token_logits
from jaxmoe.generation.engine import Engine, Request
from jaxmoe.generation.sampling import Sampling
from jaxmoe.model.kv_cache.pages import FREE
from tests.conftest import one_device

VOCABULARY = 120
GREEDY = Sampling(temperature=0.0)


def random_requests(rng, count):
    """Prompts of 1 to 170 tokens, many of which begin like others; chunks have 16, pages 64."""
    stems = [()]
    for _ in range(rng.integers(1, 4)):
        stem = stems[rng.integers(len(stems))]
        stems.append((*stem, *draw(rng, rng.integers(1, 120))))
    requests = []
    for i in range(count):
        prompt = (*stems[rng.integers(len(stems))], *draw(rng, rng.integers(1, 50)))[:170]
        requests.append(Request(i, prompt, int(rng.integers(1, 24)), GREEDY))
        if rng.random() < 0.2:  # several answers to one prompt
            requests.append(Request(f"{i} again", prompt, int(rng.integers(1, 24)), GREEDY))
    return requests


def draw(rng, count):
    return rng.integers(0, VOCABULARY, count).tolist()


def answers_of(engine, check_step=lambda engine: None):
    answers = {}
    for request, token, _ in engine.run():
        answers.setdefault(request.id, []).append(token)
        check_step(engine)
    return answers


def check_answers(model, requests, answers, ends=()):
    """Each token is the likeliest after all before it, by one forward pass without a cache."""
    texts = [[*request.tokens, *answers[request.id]] for request in requests]
    width = 200
    tokens = np.array([text + [0] * (width - len(text)) for text in texts])
    segments = np.array([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    logits = token_logits(model.config, model.params, tokens, segments)
    for request, text, row in zip(requests, texts, logits, strict=True):
        answer = answers[request.id]
        row = row[len(request.tokens) - 1 : len(text) - 1]
        chosen = row[np.arange(len(answer)), answer]
        assert (chosen >= row.max(-1) - 1e-4).all(), request.id
        assert len(answer) == request.max_new_tokens or answer[-1] in ends


def no_page_is_left(engine):
    """All pages are free, but those of rows that the next step would empty."""
    scheduler = engine._scheduler
    rows = [row for group in scheduler._groups for row in group.rows]
    assert not any(rows)
    assert all(not group.held for group in scheduler._groups)


def poison_free_pages(engine):
    """NaN in pages that belong to no row: whoever sees one shows it."""
    cache, layers = engine.cache, []
    owners = {pool.owner.shape[0]: pool.owner for pool in cache.pools}
    for layer in cache.layers:
        free = (owners[layer.k.shape[0]] == FREE)[:, None, None, None]
        layers.append(
            layer._replace(k=jnp.where(free, jnp.nan, layer.k), v=jnp.where(free, jnp.nan, layer.v))
        )
    engine.cache = cache._replace(layers=tuple(layers))


@pytest.mark.parametrize("seed", range(12))
def test_one_device(small, seed):
    rng = np.random.default_rng(seed)
    for _ in range(10):
        requests = random_requests(rng, int(rng.integers(1, 14)))
        options = {"rows": int(rng.choice([1, 2, 4])), "step_tokens": int(rng.choice([16, 64]))}
        ends = tuple(draw(rng, rng.integers(0, 3)))
        with jax.set_mesh(one_device()):
            engine = Engine(small.config, small.params, requests, stop_ids=ends, **options)
            answers = answers_of(engine)
        check_answers(small, requests, answers, ends)
        no_page_is_left(engine)
