"""What the model returns of its routers: small, and dropped assignments really counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.mesh import MeshConfig
from jaxmoe.model import moe
from jaxmoe.model.transformer import forward, positions_of
from tests.model import moe_layer

E = 8


def test_no_logits_are_kept(small):
    """A few numbers for each expert of each layer, however many tokens there are."""
    tokens = jnp.zeros((2, 48), jnp.int32)
    out = jax.eval_shape(
        lambda params: forward(small.config, params, tokens, tokens, tokens + 1), small.params
    )
    assert len(out.router_stats) == len(small.config.layers)
    for stats in out.router_stats:
        shapes = {name: leaf.shape for name, leaf in stats._asdict().items()}
        assert shapes.pop("assignments") == shapes.pop("mean_probability") == (E,)
        assert set(shapes.values()) == {()}


def test_padding_does_not_count(small):
    """Nor does what stands there: the same numbers without it, and with other tokens in it."""
    rng = np.random.default_rng(0)
    tokens, other = rng.integers(0, small.config.vocab_size, (2, 2, 20))
    segments = np.ones((2, 20), int)
    segments[:, :7] = 0
    other[:, 7:] = tokens[:, 7:]

    def stats_of(tokens, segments):
        tokens, segments = jnp.asarray(tokens), jnp.asarray(segments)
        return forward(small.config, small.params, tokens, positions_of(segments), segments)[2]

    want = stats_of(tokens[:, 7:], segments[:, 7:])
    for padded in (stats_of(tokens, segments), stats_of(other, segments)):
        for ours, theirs in zip(jax.tree.leaves(padded), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert want[0].tokens == 26


@pytest.mark.parametrize("k", [1, 2])
def test_a_token_that_is_sent_nowhere_is_dropped(k, monkeypatch):
    config = moe_layer.config(k)
    p, x, real = moe_layer.draw(config, 2, 9)
    real = real.at[0, 3].set(True).at[1, 5].set(True)
    route = moe.route

    def forgetful(*arguments):
        routing = route(*arguments)
        return routing._replace(expert=routing.expert.at[0, 3].set(E).at[1, 5, 0].set(E))

    monkeypatch.setattr(moe, "route", forgetful)
    stats = moe.moe(config, p, x, real)[1]
    assert stats.dropped == k + 1
    assert stats.assignments.sum() + stats.dropped == k * stats.tokens


def test_a_row_lost_on_its_way_is_dropped(monkeypatch):
    """The router did its part: only a count where experts run can see it."""
    config, send = moe_layer.config(), moe.send

    def losing_the_first(plan, rows, axis):
        return send(plan, rows, axis).at[0].set(0)

    monkeypatch.setattr(moe, "send", losing_the_first)
    p, x, real = moe_layer.draw(config, 8, 72)
    with jax.set_mesh(MeshConfig(expert=8).make()):
        stats = jax.jit(moe.moe, static_argnums=0)(config, p, x, real)[1]
    assert stats.assignments.min() > 0 and stats.assignments.sum() == stats.tokens
    assert stats.dropped == 8  # one on each device


@pytest.mark.parametrize(
    ("assignments", "load", "peak"),
    [((2, 2, 2, 2), 0.25, 1), ((8, 0, 0, 0), (1, 0, 0, 0), 4), ((0, 0, 0, 0), 0, 0)],
    ids=["even", "collapse", "all padding"],
)
def test_load_and_peak(assignments, load, peak):
    zero = jnp.int32(0)
    stats = moe.RouterStats(
        jnp.array(assignments), jnp.zeros(4), *2 * (jnp.float32(0),), zero, zero
    )
    np.testing.assert_array_equal(stats.load, np.broadcast_to(load, 4))
    assert stats.peak == peak
