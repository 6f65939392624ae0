"""The head's passes against NumPy's, one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import Llama4Config
from jaxmoe.eagle_config import eagle_from_hf
from jaxmoe.hf_config import from_hf
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.eagle import abstract_eagle, draft_logits, init_draft_cache
from jaxmoe.model.eagle_unroll import draft_chain, unroll
from tests import tiny
from tests.eagle import Head, head_config, head_tensors, plain_params, target_ids

TARGET: Llama4Config = from_hf(tiny.scout_like(), "tiny")
COUNT, ROOM = 5, 24


def made(**overrides):
    """A head: its JSON, its tensors, its config, parameters and a table of embeddings."""
    mapping = head_config(**overrides)
    tensors = head_tensors(mapping, 7)
    config, _ = eagle_from_hf(mapping, "head", TARGET)
    table = np.random.default_rng(8).normal(size=(128, 64)).astype(np.float32)
    return mapping, tensors, config, plain_params(mapping, tensors), table


def text(rows, length):
    rng = np.random.default_rng(9)
    tokens = rng.integers(0, 128, (rows, length), np.int32)
    return tokens, rng.normal(size=(rows, length, 3 * 64)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 9))
def chain(*arguments):
    return draft_chain(*arguments)


VARIANTS = [{}, {"norm_before_residual": True, "head_dim": 8}]


@pytest.mark.parametrize("overrides", VARIANTS)
def test_a_chain_drafts_what_numpy_drafts(overrides):
    """In two calls, of rows that differ in length: keys of padding would show, or wrong places."""
    mapping, tensors, config, params, table = made(**overrides)
    tokens, states = text(2, 12)
    lengths = [(6, 3), (4, 5)]  # of each row, tokens of both calls
    cache = init_draft_cache(config, 2, ROOM, jnp.float32)
    heads = [Head(mapping, tensors, table) for _ in range(2)]
    for call in range(2):
        starts = [sum(row[:call]) for row in lengths]
        new = np.zeros((2, 6), np.int32), np.zeros((2, 6, 192), np.float32)
        real = np.zeros((2, 6), np.int32)
        for i, start in enumerate(starts):
            n = lengths[i][call]
            new[0][i, :n] = tokens[i, start : start + n]
            new[1][i, :n] = states[i, start : start + n]
            real[i, :n] = 1
        positions = np.array(starts, np.int32)[:, None] + np.arange(6, dtype=np.int32)
        ids = jnp.asarray(target_ids(tensors), jnp.int32)
        rows = map(jnp.asarray, (*new, positions, real))
        found = chain(config, params, table, ids, *rows, cache, COUNT)
        cache = found.cache
        for i, start in enumerate(starts):
            span = slice(start, start + lengths[i][call])
            guesses, logits = heads[i].draft(tokens[i, span], states[i, span], COUNT, start)
            heads[i].keys = heads[i].keys[: span.stop]  # the guesses' keys are not kept
            np.testing.assert_allclose(found.logits[i], logits, atol=1e-4)
            assert found.tokens[i].tolist() == guesses


def numpy_unrolled(mapping, tensors, table, tokens, states, segments, passes):
    """The logits [S, passes, G] of chains from every place of a row that follow its own tokens."""
    found = np.full((len(tokens), passes, mapping["draft_vocab_size"]), np.nan)
    for t, segment in enumerate(segments):
        first = list(segments).index(segment)
        ahead = int(np.sum(np.asarray(segments[t + 1 :]) == segment)) if segment else 0
        count = min(passes, ahead)
        if count:
            head, text = Head(mapping, tensors, table), tokens[first + 1 : t + 2]
            forced = tokens[t + 2 :]
            found[t, :count] = head.draft(text, states[first : t + 1], count, forced=forced)[1]
    return found


def check_unrolled(mesh=None, passes=3):
    """Rows with two segments and padding."""
    mapping, tensors, config, params, table = made()
    tokens, states = text(2, 16)
    segments = np.repeat([[1, 2, 0], [3, 3, 4]], [7, 6, 3], axis=1).astype(np.int32)

    @jax.jit
    def run(params, table, tokens, states, segments):
        found = unroll(config, params, table, tokens, states, segments, passes)
        return jnp.stack([draft_logits(config, params, hidden) for hidden in found], axis=2)

    if mesh is None:
        got = run(params, table, tokens, states, segments)
    else:
        placed = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding),
            params,
            abstract_eagle(config, mesh, jnp.float32),
        )
        with jax.set_mesh(mesh):
            got = run(placed, table, tokens, states, segments)
    for i in range(2):
        wanted = numpy_unrolled(mapping, tensors, table, tokens[i], states[i], segments[i], passes)
        known = ~np.isnan(wanted)
        assert known.any()
        np.testing.assert_allclose(np.asarray(got[i])[known], wanted[known], atol=1e-4)


def test_unrolled_passes_are_chains_from_every_place():
    """A pass that saw another place's later keys, or not its own, would differ."""
    check_unrolled()


@pytest.mark.parametrize("mesh", ["data=2,tensor=2,sequence=2", "fsdp=2,tensor=2,sequence=2"])
def test_unrolled_passes_on_a_mesh(mesh):
    check_unrolled(MeshConfig.parse(mesh).make())


def test_a_chain_on_a_mesh():
    mapping, tensors, config, params, table = made()
    tokens, states = text(4, 6)
    mesh = MeshConfig.parse("data=2,fsdp=2,tensor=2").make()
    placed = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding),
        params,
        abstract_eagle(config, mesh, jnp.float32),
    )
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), (4, 6))
    ids = jnp.asarray(target_ids(tensors), jnp.int32)
    rows = map(jnp.asarray, (tokens, states, positions, np.ones((4, 6), np.int32)))
    with jax.set_mesh(mesh):
        cache = init_draft_cache(config, 4, ROOM, jnp.float32)
        found = chain(config, placed, table, ids, *rows, cache, 3)
    for i in range(4):
        guesses, logits = Head(mapping, tensors, table).draft(tokens[i], states[i], 3)
        np.testing.assert_allclose(found.logits[i], logits, atol=1e-4)
        assert found.tokens[i].tolist() == guesses
