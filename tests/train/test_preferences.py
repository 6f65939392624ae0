"""Preference losses against a NumPy reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.train.preferences import (
    Pairs,
    answer_log_probabilities,
    pair_losses,
    pair_metrics,
)

SEGMENTS = np.array([[1] * 5 + [2] * 4 + [3] * 3 + [4] * 6 + [0] * 2, [1] * 7 + [2] * 8 + [0] * 5])
PAIRS = 2  # the second row has one


def _drawn(seed):
    rng = np.random.default_rng(seed)
    targets = (rng.random(SEGMENTS.shape) < 0.7) & (SEGMENTS > 0)
    nats = [rng.exponential(2.0, SEGMENTS.shape) for _ in range(2)]
    return nats, targets


def _sums(nats, targets, segment):
    """Log-probabilities [B] of the answers that are segment number `segment`."""
    return -np.where(targets & (segment == SEGMENTS), nats, 0.0).sum(1)


def _margins(policy, reference, targets):
    """h of each pair, in float64, and which pairs there are."""
    h = np.zeros((len(SEGMENTS), PAIRS))
    for i in range(PAIRS):
        ratio = [
            _sums(policy, targets, s) - _sums(reference, targets, s) for s in (2 * i + 1, 2 * i + 2)
        ]
        h[:, i] = ratio[0] - ratio[1]
    return h, np.array([[True, True], [True, False]])


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _loss(objective, h, beta, smoothing):
    """The loss of each pair, and its derivative by h."""
    if objective == "sigmoid":
        value = -(1 - smoothing) * np.log(_sigmoid(beta * h)) - smoothing * np.log(
            _sigmoid(-beta * h)
        )
        return value, beta * (smoothing - _sigmoid(-beta * h))
    if objective == "ipo":
        return (h - 1 / (2 * beta)) ** 2, 2 * (h - 1 / (2 * beta))
    return np.maximum(0, 1 - beta * h), np.where(beta * h < 1, -beta, 0.0)


def _of(nats, targets) -> Pairs:
    arrays = (jnp.asarray(x) for x in (nats.astype(np.float32), targets, SEGMENTS))
    return answer_log_probabilities(*arrays, PAIRS)


@pytest.mark.parametrize(
    ("objective", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0)]
)
def test_values_and_gradients_are_those_of_float64(objective, smoothing):
    (policy, reference), targets = _drawn(0)
    beta = 0.3

    def mean(nats):
        pairs = answer_log_probabilities(nats, jnp.asarray(targets), jnp.asarray(SEGMENTS), PAIRS)
        losses = pair_losses(pairs, _of(reference, targets), beta, objective, smoothing)
        return jnp.sum(jnp.where(pairs.real, losses, 0.0)) / jnp.sum(pairs.real)

    value, gradient = jax.value_and_grad(mean)(jnp.asarray(policy, jnp.float32))
    h, real = _margins(policy, reference, targets)
    losses, slopes = _loss(objective, h, beta, smoothing)
    assert value == pytest.approx(losses[real].mean(), rel=1e-5)
    wanted = np.zeros(SEGMENTS.shape)
    for i in range(PAIRS):
        for segment, sign in ((2 * i + 1, -1.0), (2 * i + 2, 1.0)):
            here = targets & (segment == SEGMENTS)
            wanted += here * (sign * slopes[:, i] * real[:, i] / real.sum())[:, None]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_a_policy_that_is_its_reference_loses_ln_2():
    (policy, _), targets = _drawn(1)
    pairs = _of(policy, targets)
    losses = pair_losses(pairs, pairs, 0.1)
    assert (np.asarray(losses) == np.float32(np.log(2))).all()
    assert float(pair_metrics(pairs, pairs, 0.1)["rewards/accuracies"]) == 0


def test_metrics_are_means_over_the_pairs_that_are_there():
    (policy, reference), targets = _drawn(2)
    found = pair_metrics(_of(policy, targets), _of(reference, targets), 0.5)
    h, real = _margins(policy, reference, targets)
    assert float(found["rewards/margins"]) == pytest.approx(0.5 * h[real].mean(), rel=1e-5)
    assert float(found["rewards/accuracies"]) == pytest.approx((h[real] > 0).mean())
    chosen = [
        _sums(policy, targets, 1)[0],
        _sums(policy, targets, 3)[0],
        _sums(policy, targets, 1)[1],
    ]
    assert float(found["logps/chosen"]) == pytest.approx(np.mean(chosen), rel=1e-5)
