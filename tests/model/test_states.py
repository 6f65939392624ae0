"""The residual streams that `forward(states=)` returns, against the plain model's."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.model.kv_cache import init_cache
from jaxmoe.model.transformer import forward, positions_of
from tests import reference

LENGTH = 12


def inputs(rows=1):
    tokens = np.random.default_rng(3).integers(0, 100, (rows, LENGTH), np.int32)
    segments = np.ones_like(tokens)
    return tuple(map(jnp.asarray, (tokens, positions_of(jnp.asarray(segments)), segments)))


def test_states_are_the_streams_before_layers(small):
    """Streams of other layers, normed ones, or a residual without its last sum would differ."""
    tokens, positions, segments = inputs(2)
    tensors = {name: x.astype(np.float64) for name, x in small.tensors.items()}
    wanted = list(reference.streams(small.hf_config, tensors, tokens, np.asarray(segments)))
    ids = (0, 2, 1)
    out = jax.jit(lambda p: forward(small.config, p, tokens, positions, segments, states=ids))(
        small.params
    )
    assert out.states is not None
    parts = np.split(np.asarray(out.states), 3, axis=-1)
    for part, i in zip(parts, ids, strict=True):
        np.testing.assert_allclose(part, wanted[i], atol=1e-4)


def test_states_through_a_cache_are_the_same(small):
    tokens, positions, segments = inputs()
    whole = forward(small.config, small.params, tokens, positions, segments, states=(1, 2))
    cache, parts = init_cache(small.config, 1, 128, jnp.float32), []
    step = jax.jit(lambda p, *new: forward(small.config, p, *new, states=(1, 2)))
    for start, stop in ((0, 11), (11, 12)):
        new = (x[:, start:stop] for x in (tokens, positions, segments))
        out = step(small.params, *new, cache)
        cache = out.cache
        parts.append(out.states)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole.states, atol=1e-5)


def test_unused_states_cost_nothing(small):
    """Neither states that are not asked for, nor those whose values are not used."""
    tokens, positions, segments = inputs()

    def run(p):
        return forward(small.config, p, tokens, positions, segments)

    def asks(p):
        out = forward(small.config, p, tokens, positions, segments, states=(1,))
        return out._replace(states=None)

    plain, dropped = (jax.jit(f).lower(small.params).compile().as_text() for f in (run, asks))
    assert run(small.params).states is None
    assert plain.count("\n") == dropped.count("\n")
