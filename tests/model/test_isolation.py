"""NaN of one token, row or request leaves the others' bits alone, on one device and on many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.eval.logits import token_logits
from jaxmoe.generation.engine import Request, generate
from jaxmoe.generation.sampling import Sampling
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.kv_cache import PAGE, init_cache, restart_rows
from jaxmoe.model.transformer import forward
from tests import tiny
from tests.conftest import load_tiny, one_device
from tests.isolation import assert_isolated, is_spoiled, marked, put
from tests.model import moe_layer

SPREAD = "tensor=2,sequence=2,data=2"
BAD = 7  # a token whose embedding is NaN


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A local and a global layer."""
    config = tiny.scout_like(num_hidden_layers=2, no_rope_layer_interval=2)
    return load_tiny(tmp_path_factory.mktemp("isolation"), config, tiny.random_tensors(config, 4))


def on_mesh(spec):
    return one_device() if spec is None else MeshConfig.parse(spec).make()


def spoiled(params):
    table = params["embed"]
    return params | {"embed": jax.device_put(table.at[BAD].set(np.nan), table.sharding)}


def drawn(config, *shape):
    """Tokens, none of them bad."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)
    return np.where(tokens == BAD, BAD + 1, tokens)


@pytest.mark.parametrize(
    ("spec", "length", "k"),
    [
        (None, 3, 1),
        (None, 80, 2),
        ("expert=8", 3, 2),
        ("expert=8", 80, 1),
        ("data=2,expert=2,sequence=2", 3, 1),
        ("data=2,expert=2,sequence=2", 80, 2),
        ("tensor=8", 3, 2),
        ("tensor=8", 80, 1),
    ],
)
def test_experts(spec, length, k):
    """NaN of a token, and of a padding token that is not even counted, reaches no other token."""
    config = moe_layer.config(k)
    p, x, real = moe_layer.draw(config, 8, length)
    real = put(real, (3, 1), True)
    with jax.set_mesh(on_mesh(spec)):
        run = jax.jit(functools.partial(moe_layer.run, config, p))
        want, _ = run(x, real)
        got, stats = run(put(x, (3, 1), np.nan), real)
        padding = [run(given, put(real, (5, 2), False)) for given in (x, put(x, (5, 2), np.nan))]
    assert_isolated(got, want, put(np.zeros(x.shape[:2], bool), (3, 1), True))
    assert is_spoiled(got[3, 1]) and stats.dropped == 0
    (want, want_stats), (got, stats) = padding
    assert_isolated(got, want, put(np.zeros(x.shape[:2], bool), (5, 2), True))
    for ours, theirs in zip(stats, want_stats, strict=True):
        assert_isolated(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("spec, kv", [(None, None), (SPREAD, "int8")])
def test_rows_of_a_batch(model, spec, kv):
    """In segments and in steps of one token, through the cache."""
    path = {"prefill_chunk": 24, "decode_from": 52, "kv": kv}
    tokens = put(drawn(model.config, 4, 61), (1, 5), BAD)
    with jax.set_mesh(on_mesh(spec)):
        params = model.on(jax.sharding.get_mesh())
        want, got = (
            token_logits(model.config, given, tokens, **path) for given in (params, spoiled(params))
        )
    assert_isolated(got, want, marked(4, 1))
    assert np.isnan(got[1, 5:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("kv", [jnp.float32, "fp8"])
def test_pages_are_free_of_their_past(model, kv):
    """A row reads the rest of a page that a spoiled one has left; bits are those of a new cache."""
    run = jax.jit(lambda params, cache, *new: forward(model.config, params, *new, cache))
    real = np.arange(150)[None] < np.array([[150], [20]])
    positions = np.broadcast_to(np.arange(150, dtype=np.int32), real.shape)
    segments, tokens = real.astype(np.int32), drawn(model.config, 2, 150)
    new = init_cache(model.config, 2, 2 * PAGE, kv, tokens=3 * PAGE)
    used = run(spoiled(model.params), new, np.full_like(tokens, BAD), positions, segments)
    assert is_spoiled(used.hidden[0]) and is_spoiled(used.hidden[1])
    used = restart_rows(used.cache, jnp.array([True, True]))
    outs = [run(model.params, cache, tokens, positions, segments[::-1]) for cache in (new, used)]
    last = np.array([[20], [150]], np.int32)
    steps = [run(model.params, out.cache, tokens[:, :1], last, np.ones_like(last)) for out in outs]
    for fresh, again in (outs, steps):
        assert_isolated(again.hidden, fresh.hidden)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [None, SPREAD])
def test_requests(model, spec):
    """Beside a spoiled one, and after it, in its row and in its pages."""
    prompts = [tuple(drawn(model.config, n).tolist()) for n in (69, 30, 40, 9)]
    prompts[0] = (BAD, *prompts[0])
    requests = [Request(str(i), prompt, 8) for i, prompt in enumerate(prompts)]

    def answers(params, settings):
        written = [[] for _ in requests]
        options = {"rows": 2, "step_tokens": 16, "stop_ids": (), "cache_tokens": 3 * PAGE}
        for token in generate(model.config, params, requests, settings, **options):
            written[int(token.request.id)].append(token.token)
        return written

    with jax.set_mesh(on_mesh(spec)):
        params = model.on(jax.sharding.get_mesh())
        for settings in (Sampling(temperature=0.0), Sampling(temperature=1.0, seed=3)):
            want, got = (answers(given, settings) for given in (params, spoiled(params)))
            assert got[1:] == want[1:] and got[0] != want[0]
