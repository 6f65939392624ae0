"""Random workloads: whatever runs beside a request, its answer is the model's own continuation.

`JAXMOE_WORKLOADS=10` runs ten times as many.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.eval.logits import token_logits
from jaxmoe.generation.engine import Engine, Request
from jaxmoe.generation.sampling import Sampling
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.kv_cache import cache_kind, cache_kinds, restart_rows
from jaxmoe.model.kv_cache.pages import FREE, NULL
from tests import tiny
from tests.conftest import load_tiny, one_device
from tests.tiers import TIMES, slow_after_first

VOCABULARY, LONGEST, MOST = 120, 200, 24  # tokens of a text, and requests of a workload
GREEDY = Sampling(temperature=0.0)


def draw(rng, count):
    return tuple(rng.integers(0, VOCABULARY, count).tolist())


def random_requests(rng):
    """Prompts of 1 to 170 tokens, many of which begin like others; chunks have 16, pages 64."""
    stems, requests = [()], []
    for _ in range(rng.integers(1, 4)):
        stems.append(stems[rng.integers(len(stems))] + draw(rng, rng.integers(1, 120)))
    for i in range(rng.integers(1, MOST // 2)):
        prompt = (stems[rng.integers(len(stems))] + draw(rng, rng.integers(1, 50)))[:170]
        answers = 2 if rng.random() < 0.2 else 1  # to the same prompt
        requests += [
            Request(f"{i}#{j}", prompt, int(rng.integers(1, 24)), GREEDY) for j in range(answers)
        ]
    return requests


def answers_of(engine, after_step=lambda engine: None):
    answers = {}
    for request, token, _ in engine.run():
        answers.setdefault(request.id, []).append(token)
        after_step(engine)
    return answers


def check_answers(model, requests, answers, ends):
    """Each token is the likeliest after all before it, by one forward pass without a cache."""
    texts = [[*request.tokens, *answers[request.id]] for request in requests]
    tokens, segments = np.zeros((2, MOST, LONGEST), np.int32)
    for i, text in enumerate(texts):
        tokens[i, : len(text)], segments[i, : len(text)] = text, 1
    logits = token_logits(model.config, model.params, tokens, segments)
    for request, text, row in zip(requests, texts, logits, strict=False):
        answer = answers[request.id]
        row = row[len(request.tokens) - 1 : len(text) - 1]
        assert (row[np.arange(len(answer)), answer] >= row.max(-1) - 1e-4).all(), request
        assert len(answer) == request.max_new_tokens or answer[-1] in ends
        assert not set(answer[:-1]) & set(ends)


def check_nothing_is_left(engine):
    """No row, no prefix and no page is in use, for the scheduler and on the devices."""
    for group in engine._scheduler._groups:
        assert not any(group.rows) and not group.held
    leaving = jnp.ones(len(engine.cache.length), bool)
    for pool in jax.jit(restart_rows)(engine.cache, leaving).pools:
        assert (np.asarray(pool.owner) == FREE).sum() == (np.asarray(pool.owner) != NULL).sum()


def poison_free_pages(engine):
    """NaN in the pages that no row has: whoever sees one shows it."""
    cache = engine.cache
    kinds, specs = cache_kinds(engine._config), engine._config.attention_specs
    owners = dict(zip(kinds, (pool.owner for pool in cache.pools), strict=True))
    free = [(owners[cache_kind(spec)] == FREE)[:, None, None, None] for spec in specs]
    engine.cache = cache._replace(layers=_poison(cache.layers, free))


@jax.jit
def _poison(layers, free):
    def poison(x, where):
        return jnp.where(where, jnp.nan, x)

    pairs = zip(layers, free, strict=True)
    return tuple(jax.tree.map(lambda x, w=where: poison(x, w), layer) for layer, where in pairs)


@pytest.mark.runs_long
@pytest.mark.parametrize(
    ("mesh", "rows", "count"),
    slow_after_first(
        [
            (None, 3, 10),
            (None, 1, 6),
            ("expert=4,sequence=2", 8, 10),
            ("data=2,fsdp=2,tensor=2", 4, 6),
        ]
    ),
)
def test_each_answer_is_the_models_own(small, mesh, rows, count):
    """Rows join and leave, prompts share prefixes and end in pages, answers stop early."""
    mesh = MeshConfig.parse(mesh).make() if mesh else one_device()
    params, rng, shared = small.on(mesh), np.random.default_rng(rows), 0
    for _ in range(TIMES * count):
        requests, ends = random_requests(rng), draw(rng, rng.integers(0, 3))
        with jax.set_mesh(mesh):
            options = {"rows": rows, "step_tokens": 32, "stop_ids": ends}
            engine = Engine(small.config, params, requests, **options)
            answers = answers_of(engine, poison_free_pages)
            check_nothing_is_left(engine)
        with jax.set_mesh(one_device()):
            check_answers(small, requests, answers, ends)
        shared += engine.tokens < sum(len(r.tokens) + len(answers[r.id]) - 1 for r in requests)
    assert shared  # workloads in which fewer tokens were computed than the requests have


@pytest.mark.slow
def test_a_prefix_is_computed_once(small):
    """A hundred requests behind 2,000 tokens: these are computed once, and held once."""
    rng = np.random.default_rng(0)
    prefix = draw(rng, 2000)
    requests = [Request(i, (*prefix, i, *draw(rng, i % 7)), 3, GREEDY) for i in range(100)]
    with jax.set_mesh(one_device()):
        engine = Engine(small.config, small.params, requests, rows=8, stop_ids=(), drafts=0)
        most = []
        answers = answers_of(
            engine, lambda e: most.append((np.asarray(e.cache.full.owner) >= 0).sum())
        )
    own = sum(len(request.tokens) - len(prefix) + 3 - 1 for request in requests)
    assert engine.tokens == len(prefix) + own
    assert max(most) <= -(-len(prefix) // 64) + 8  # a page for what each row has of its own
    for request in (requests[0], requests[57], requests[99]):
        logits = token_logits(
            small.config, small.params, np.array([[*request.tokens, *answers[request.id]]])
        )
        chosen = logits[0, len(request.tokens) - 1 : -1].argmax(-1)
        assert chosen.tolist() == answers[request.id]


@pytest.mark.slow
@pytest.mark.parametrize(("length", "step_tokens"), [(3000, 64), (100_000, 512)])
def test_a_row_that_writes_gets_a_token_in_every_step(tmp_path, length, step_tokens):
    """Another reads a prompt beside it; of the long one only local layers, which take less time."""
    hf_config = tiny.scout_like(
        num_hidden_layers=2 if length < 10_000 else 1, no_rope_layer_interval=2, hidden_size=32,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=131_072,
    )  # fmt: skip
    model = load_tiny(tmp_path, hf_config, tiny.random_tensors(hf_config, 3))
    rng, steps = np.random.default_rng(0), length // (step_tokens - 1) + 1
    writer = Request("writes", draw(rng, 5), steps + 50, GREEDY)
    reader = Request("reads", draw(rng, length), 1, GREEDY)
    with jax.set_mesh(one_device()):
        engine = Engine(
            model.config, model.params, [writer, reader], rows=2, step_tokens=step_tokens,
            stop_ids=(), drafts=0,
        )  # fmt: skip
        order = [request.id for request, *_ in engine.run()]
    assert steps - 2 <= order.index("reads") <= steps + 2  # one token of "writes" for each step
    assert engine.steps <= writer.max_new_tokens + 1
