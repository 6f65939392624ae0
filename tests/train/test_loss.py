import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint.mapping import names
from jaxmoe.checkpoint.mapping.tensors import array_shapes, expand
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.moe import Routing, router_stats
from jaxmoe.model.params import named_specs
from jaxmoe.train.loss import cross_entropy_sum, losses, next_tokens, router_losses
from tests import reference

SEGMENTS = jnp.array([[0, 0, 1, 1, 1, 2, 2, 2, 2], [3, 3, 3, 3, 3, 3, 3, 0, 0]])


def numpy_cross_entropy(logits, tokens, segment_ids):
    """Sum and number of targets, token by token in float64."""
    nats = []
    for b, t in np.ndindex(*tokens.shape):
        last = t + 1 == tokens.shape[1]
        if not last and segment_ids[b, t] and segment_ids[b, t] == segment_ids[b, t + 1]:
            p = np.exp(logits[b, t].astype(np.float64))
            nats.append(-np.log(p[tokens[b, t + 1]] / p.sum()))
    return sum(nats), len(nats)


def test_targets_stay_within_their_segment():
    tokens = jnp.arange(18).reshape(2, 9)
    targets, real = next_tokens(tokens, SEGMENTS)
    np.testing.assert_array_equal(
        np.where(real, targets, -1),
        [[-1, -1, 3, 4, -1, 6, 7, 8, -1], [10, 11, 12, 13, 14, 15, -1, -1, -1]],
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_equals_numpy_in_float64(dtype):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 9, 50)) * 5, dtype)
    tokens = jnp.asarray(rng.integers(50, size=(2, 9)))
    total, count = cross_entropy_sum(logits, tokens, SEGMENTS)
    wanted, wanted_count = numpy_cross_entropy(np.asarray(logits), tokens, SEGMENTS)
    assert total.dtype == jnp.float32
    assert count == wanted_count == 11
    np.testing.assert_allclose(total, wanted, rtol=1e-6)


def random_routing(rng, k, E=4):
    """As `route` makes it: padding goes to expert E."""
    logits = rng.normal(size=(*SEGMENTS.shape, E)).astype(np.float32) * 3
    expert = np.argsort(-logits, axis=-1)[..., :k]
    expert = np.where(SEGMENTS[..., None] != 0, expert, E)
    return Routing(jnp.asarray(logits), jnp.asarray(expert), jnp.ones(expert.shape))


def stats_of(routing, real=SEGMENTS != 0):
    """As `moe` returns them when every assignment arrives."""
    return router_stats(routing, real, jnp.sum(routing.expert < routing.logits.shape[-1]))


def softmax(logits):
    p = np.exp(np.asarray(logits, np.float64))
    return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("k", [1, 2])
def test_router_losses_equal_numpy(k):
    rng = np.random.default_rng(k)
    layers = tuple(random_routing(rng, k) for _ in range(3))
    balance, health = router_losses(tuple(map(stats_of, layers)))
    wanted = []
    for i, layer in enumerate(layers):
        p = softmax(layer.logits)[SEGMENTS != 0]
        chosen = np.asarray(layer.expert)[SEGMENTS != 0]
        load = np.array([(chosen == e).mean() for e in range(4)])
        wanted.append(4 * (load * p.mean(0)).sum())
        np.testing.assert_allclose(health.load[i], load, rtol=1e-6)
        np.testing.assert_allclose(health.peak[i], load.max() / load.mean(), rtol=1e-6)
        np.testing.assert_allclose(health.entropy[i], -(p * np.log(p)).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(balance, np.mean(wanted), rtol=1e-6)
    assert health.dropped == 0


def test_an_even_router_has_balance_loss_one():
    expert = jnp.arange(8).reshape(1, 8, 1) % 4
    routing = Routing(jnp.zeros((1, 8, 4)), expert, jnp.ones((1, 8, 1)))
    balance, health = router_losses((stats_of(routing, jnp.ones((1, 8), bool)),))
    np.testing.assert_allclose([balance, health.peak[0]], 1.0)


def test_a_real_token_without_expert_counts_as_dropped():
    routing = random_routing(np.random.default_rng(0), k=1)
    routing = routing._replace(expert=routing.expert.at[0, 4].set(4).at[1, 0].set(4))
    assert router_losses((stats_of(routing),))[1].dropped == 2


def test_balance_gradient_is_that_of_the_probabilities_alone():
    """The loads are counts: d loss / d logit = E / T * p_e * (load_e - sum_j load_j p_j)."""
    routing, real = random_routing(np.random.default_rng(3), k=1), SEGMENTS != 0
    gradient = jax.grad(lambda z: router_losses((stats_of(routing._replace(logits=z)),))[0])(
        routing.logits
    )
    p, load = softmax(routing.logits), np.asarray(router_losses((stats_of(routing),))[1].load[0])
    wanted = 4 / real.sum() * p * (load - (p @ load)[..., None])
    np.testing.assert_allclose(gradient, np.where(real[..., None], wanted, 0), atol=1e-7)


def test_dense_models_have_no_router_loss():
    balance, health = router_losses(())
    assert balance == 0 and health.dropped == 0


@pytest.fixture(scope="module")
def packed():
    """Two rows, packed and padded on both sides, over three chunks."""
    runs = jnp.array([[0, 1, 2], [1, 2, 0]])
    segment_ids = jnp.repeat(runs, jnp.array([5, 37, 6]), axis=1)
    tokens = np.random.default_rng(5).integers(100, size=segment_ids.shape)
    return jnp.asarray(tokens), segment_ids


def gradient(model, batch, remat):
    """Gradients of the cross entropy by dotted name."""
    return gradient_and_losses(model, model.params, batch, remat, router_loss=0.0)[0]


def gradient_and_losses(model, params, batch, remat, router_loss):
    def loss(params):
        result = losses(model.config, params, *batch, router_loss, remat)
        return result.total, result

    found, result = jax.jit(jax.grad(loss, has_aux=True))(params)
    leaves = map(np.asarray, jax.tree.leaves(found))
    return dict(zip(named_specs(model.config), leaves, strict=True)), result


def reference_loss(model, batch, name, change):
    """The NumPy model's, with one tensor changed."""
    tokens, segment_ids = map(np.asarray, batch)
    tensors = {**model.tensors, name: model.tensors[name].astype(np.float64) + change}
    logits = reference.logits(model.hf_config, tensors, tokens, segment_ids)
    total, count = numpy_cross_entropy(logits, tokens, segment_ids)
    return total / count


def test_gradient_equals_finite_differences_of_the_reference(small, packed):
    """Every tensor along a random direction; the step is too small to change the routing."""
    ours = gradient(small, packed, remat=False)
    rng, step = np.random.default_rng(6), 1e-7
    rows = names.TEXT + names.FUSED + names.LAST
    for group in expand(rows, array_shapes(small.config, {})):
        ((name, shape),) = group.tensors.items()
        direction = rng.normal(size=shape)
        up, down = (
            reference_loss(small, packed, name, sign * step * direction) for sign in (1, -1)
        )
        slope = 0.0
        for block in group.blocks(itemsize=8):
            flat = direction.reshape(-1)[block.start : block.start + block.count]
            parts = group.layout.split(flat, block.shape)
            for n, part in zip(group.params, parts, strict=True):
                slope += np.vdot(ours[n][block.index], part)
        np.testing.assert_allclose(
            slope, (up - down) / (2 * step), rtol=1e-4, atol=1e-6, err_msg=name
        )


def test_remat_does_not_change_the_gradient(small, packed):
    kept, recomputed = (gradient(small, packed, remat) for remat in (False, True))
    for name, value in kept.items():
        np.testing.assert_allclose(recomputed[name], value, atol=1e-6, err_msg=name)


def test_the_balance_loss_on_a_mesh_and_recomputed(small, packed):
    """Statistics of routers go through `jax.checkpoint` and over devices; the loss is large."""
    wanted, on_one = gradient_and_losses(small, small.params, packed, False, router_loss=5.0)
    mesh = MeshConfig.parse("fsdp=2,sequence=2,tensor=2").make()
    with jax.set_mesh(mesh):
        found, on_mesh = gradient_and_losses(small, small.on(mesh), packed, True, router_loss=5.0)
    for one, other in zip(jax.tree.leaves(on_one), jax.tree.leaves(on_mesh), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5)
    for name, value in wanted.items():
        error = abs(found[name] - value).max()
        assert error <= 1e-5 * max(1, abs(value).max()), name
    plain = gradient(small, packed, remat=False)
    routers = [name for name in plain if name.endswith("router")]
    assert all(abs(wanted[name] - plain[name]).max() > 1e-3 for name in routers)
