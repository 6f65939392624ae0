"""The model through pages: any segment, quantized, recycled or new, on one device or many."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import SCOUT, layer_kinds
from jaxmoe.eval.logits import token_logits
from jaxmoe.generation.engine import Request, generate
from jaxmoe.generation.sampling import Sampling
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.kv_cache import PAGE, init_cache, restart_rows
from jaxmoe.model.params import abstract_params, init_params
from jaxmoe.model.transformer import forward
from pallas_kernels.attention import paged

# Chunks of 96 are no multiple of a page; heads of 128 are what int4 takes.
CONFIG = dataclasses.replace(
    SCOUT,
    hidden_size=32,
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    vocab_size=64,
    num_local_experts=1,  # no token changes its expert for a rounding
    attention_chunk_size=96,
    max_position_embeddings=2048,
    layers=layer_kinds(2, nope_interval=2),
)
ROWS, LENGTH = 2, 300
# Of the largest logit. A scale for each token and head leaves steps of 1/254 and 1/14 of the
# largest element, and fp8 steps of 1/16 of each.
ERRORS = {"bf16": 0.01, "int8": 0.01, "fp8": 0.05, "int4": 0.15}


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(1))


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (ROWS, LENGTH), np.int32)
    segments = np.ones_like(tokens)
    segments[1, :7], segments[1, 120:] = 0, 2
    return tokens, segments


@pytest.fixture(scope="module")
def plain(params, batch):
    return token_logits(CONFIG, params, *batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunk", "prefill"),
    [(63, 252), (65, 260), (96, 288), (97, 194), (300, 290)],
)
def test_prefill_chunks_around_the_edges(params, batch, plain, chunk, prefill):
    """The last chunk is as long as the others, which needs no program of its own, but for one."""
    ours = token_logits(CONFIG, params, *batch, prefill_chunk=chunk, decode_from=prefill)
    assert abs(ours - plain).max() < 1e-4


def test_pieces_of_a_log(monkeypatch, params, batch, plain):
    """As a long log is read: more pieces than one, the last one partly filled."""
    monkeypatch.setattr(paged, "COPIED_ROWS", 128)
    jax.clear_caches()
    ours = token_logits(CONFIG, params, *batch, prefill_chunk=100)
    jax.clear_caches()
    assert abs(ours - plain).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "kv", "tolerance"),
    [("sequence=8", None, 1e-4), ("data=2,sequence=2,tensor=2", "int8", 1e-3)],
)
def test_meshes(params, batch, plain, mesh, kv, tolerance):
    """A number half way between two steps of int8 may be rounded either way."""
    path = {"prefill_chunk": 96, "decode_from": 288, "kv": kv}
    expected = plain if kv is None else token_logits(CONFIG, params, *batch, **path)
    mesh = MeshConfig.parse(mesh).make()
    places = jax.tree.map(lambda x: x.sharding, abstract_params(CONFIG, mesh, jnp.float32))
    with jax.set_mesh(mesh):
        ours = token_logits(CONFIG, jax.device_put(params, places), *batch, **path)
    assert abs(ours - expected).max() < tolerance


@pytest.mark.parametrize("kv", ERRORS)
def test_quantized(params, batch, plain, kv):
    ours = token_logits(CONFIG, params, *batch, prefill_chunk=96, decode_from=288, kv=kv)
    error = abs(ours - plain).max() / abs(plain).max()
    assert 0 < error < ERRORS[kv]


@pytest.mark.parametrize("kv", [jnp.float32, "int8"])
def test_recycled_pages_show_nothing_of_their_past(params, kv):
    """Bit by bit the same as in a new cache, whatever the pages held."""
    run = jax.jit(lambda cache, *new: forward(CONFIG, params, *new, cache))
    length = jnp.arange(150)[None] < jnp.array([150, 20])[:, None]
    position = jnp.broadcast_to(jnp.arange(150), length.shape)
    first, second = jax.random.randint(jax.random.key(1), (2, *length.shape), 0, 64)
    new = init_cache(CONFIG, 2, 2 * PAGE, kv, tokens=3 * PAGE)
    used = run(new, first, position, length.astype(jnp.int32)).cache
    used = restart_rows(used, jnp.array([True, True]))
    swapped = (second, position, length[::-1].astype(jnp.int32))  # the other row is the long one
    fresh, again = (run(cache, *swapped).hidden for cache in (new, used))
    np.testing.assert_array_equal(fresh, again)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "data=2,sequence=2,tensor=2"])
def test_requests_wait_for_pages(params, mesh):
    """And answer the same: a long one and many short ones in a pool for the long one."""
    lengths = [200, 5, 70, 3, 9, 64, 1, 130]
    requests = [Request(str(i), tuple(range(n % 60)) or (1,), 8) for i, n in enumerate(lengths)]
    requests[0] = Request("0", tuple(i % 64 for i in range(200)), 8)

    def answers(params, **options):
        written = {request.id: [] for request in requests}
        settings = Sampling(temperature=0.0)
        stream = generate(
            CONFIG, params, requests, settings, rows=4, step_tokens=64, stop_ids=(), **options
        )
        for token in stream:
            written[token.request.id].append(token.token)
        return written

    expected = answers(params)
    if mesh is None:
        assert answers(params, cache_tokens=256) == expected
        return
    mesh = MeshConfig.parse(mesh).make()
    places = jax.tree.map(lambda x: x.sharding, abstract_params(CONFIG, mesh, jnp.float32))
    with jax.set_mesh(mesh):
        assert answers(jax.device_put(params, places), cache_tokens=256) == expected
