import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint.mapping import names
from jaxmoe.checkpoint.mapping.tensors import array_shapes, expand
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.moe import Routing, router_stats
from jaxmoe.model.params import named_specs
from jaxmoe.train.loss import by_source, losses, metrics, next_tokens, summed_cross_entropy
from jaxmoe.train.router_losses import router_losses, router_z
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
def test_cross_entropy_equals_numpy_in_float64(small, dtype):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 9, 64)), dtype)
    head = jnp.asarray(rng.normal(size=(64, 128)), dtype)
    tokens = jnp.asarray(rng.integers(128, size=(2, 9)))
    total, count = summed_cross_entropy(small.config, {"lm_head": head}, hidden, tokens, SEGMENTS)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    wanted, wanted_count = numpy_cross_entropy(logits, tokens, SEGMENTS)
    assert total.dtype == jnp.float32
    assert count == wanted_count == 11
    np.testing.assert_allclose(total, wanted, rtol=1e-6)


def test_sources_are_told_apart():
    nats, real = jnp.arange(18.0).reshape(2, 9), SEGMENTS != 0
    found = by_source(nats, real, jnp.where(SEGMENTS == 3, 1, 0), ["one", "two", "none"])
    assert found == {
        "loss/one": np.mean([2, 3, 4, 5, 6, 7, 8]),
        "targets/one": 7,
        "loss/two": np.mean([9, 10, 11, 12, 13, 14, 15]),
        "targets/two": 7,
        "loss/none": 0,
        "targets/none": 0,
    }


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
        assert health.dead[i] == np.sum(load == 0)
    np.testing.assert_allclose(balance, np.mean(wanted), rtol=1e-6)
    assert health.dropped == 0


def test_router_z_loss_and_its_gradient_equal_numpy():
    """The gradient is 2 * lse * softmax / tokens in each layer, and 0 on padding."""
    rng, real = np.random.default_rng(4), np.asarray(SEGMENTS != 0)
    layers = [random_routing(rng, k=1) for _ in range(3)]

    def z(logits):
        return router_z(
            tuple(stats_of(r._replace(logits=x)) for r, x in zip(layers, logits, strict=True))
        )

    found, gradient = jax.value_and_grad(z)([layer.logits for layer in layers])
    exact = [np.asarray(layer.logits, np.float64) for layer in layers]
    log_sum_exp = [np.log(np.exp(x).sum(-1)) for x in exact]
    np.testing.assert_allclose(found, np.mean([x[real] ** 2 for x in log_sum_exp]), rtol=1e-6)
    for x, lse, d in zip(exact, log_sum_exp, gradient, strict=True):
        wanted = 2 * lse[..., None] * softmax(x) / real.sum() / 3
        np.testing.assert_allclose(d, np.where(real[..., None], wanted, 0), atol=1e-6)


def test_an_expert_without_tokens_is_dead():
    expert = jnp.array([0, 0, 2, 0]).reshape(1, 4, 1)
    routing = Routing(jnp.zeros((1, 4, 4)), expert, jnp.ones((1, 4, 1)))
    assert router_losses((stats_of(routing, jnp.ones((1, 4), bool)),))[1].dead == 2


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
    assert balance == 0 and health.dropped == 0 and router_z(()) == 0


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


def gradient_and_losses(model, params, batch, remat, router_loss, learned=None, **options):
    def loss(params, batch, learned):
        rows = *batch, router_loss, remat
        result = losses(model.config, params, *rows, learned=learned, **options)
        return result.total, result

    found, result = jax.jit(jax.grad(loss, has_aux=True))(params, batch, learned)
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


def test_added_losses_on_a_mesh_and_recomputed(small, packed):
    """Statistics of routers go through `jax.checkpoint` and over devices; the losses are large."""
    large = {"router_loss": 5.0, "z_loss": 0.1, "router_z_loss": 1.0}
    wanted, on_one = gradient_and_losses(small, small.params, packed, False, **large)
    mesh = MeshConfig.parse("fsdp=2,sequence=2,tensor=2").make()
    with jax.set_mesh(mesh):
        found, on_mesh = gradient_and_losses(small, small.on(mesh), packed, True, **large)
    for one, other in zip(jax.tree.leaves(on_one), jax.tree.leaves(on_mesh), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5)
    for name, value in wanted.items():
        error = abs(found[name] - value).max()
        assert error <= 1e-5 * max(1, abs(value).max()), name
    plain = gradient(small, packed, remat=False)
    routers = [name for name in plain if name.endswith("router")]
    assert all(abs(wanted[name] - plain[name]).max() > 1e-3 for name in routers)


def test_a_batch_in_parts_weighted_by_their_targets_is_the_whole(small, packed):
    """Rows with 37 and 11 targets: the mean of the rows' means would be another loss."""
    tokens, segments = packed
    learned = jnp.ones_like(tokens, bool).at[1, 12:].set(False)

    def part(rows):
        batch, options = (tokens[rows], segments[rows]), {"learned": learned[rows], "z_loss": 0.1}
        gradient, found = gradient_and_losses(small, small.params, batch, False, 0.0, **options)
        return gradient, found.total, float(metrics(found)["targets"])

    (one, at_one, n), (other, at_other, m), (whole, at_whole, count) = (
        part(slice(*rows)) for rows in ((0, 1), (1, 2), (0, 2))
    )
    assert n > m and n + m == count
    np.testing.assert_allclose((n * at_one + m * at_other) / count, at_whole, rtol=1e-6)
    for name, value in whole.items():
        mean = (n * one[name] + m * other[name]) / count
        np.testing.assert_allclose(mean, value, atol=1e-6, err_msg=name)
