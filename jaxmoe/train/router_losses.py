"""Losses of the routers, and measures of their health.

Shape letters: L MoE layers, E experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.model.moe import RouterStats

ASSIGNMENTS = "router_assignments"  # the metric that selection biases are moved by


class RouterHealth(NamedTuple):
    """How the tokens spread over the experts of each MoE layer; padding does not count."""

    assignments: Int[Array, "L E"]  # how many each expert gets
    load: Float[Array, "L E"]  # fraction of the assignments that each expert gets
    entropy: Float[Array, "L"]  # of the router's softmax, mean over tokens, in nats
    peak: Float[Array, "L"]  # the largest load over the mean load: 1 is even, E is collapse
    dead: Int[Array, "L"]  # experts without a token
    dropped: Int[Array, ""]  # assignments that reached no expert


def router_losses(layers: tuple[RouterStats, ...]) -> tuple[Float[Array, ""], RouterHealth]:
    """The load-balance loss, mean over MoE layers (0 if there are none), and the routers' health.

    A layer's loss is E * sum_e(fraction of assignments to e * mean softmax probability of e), which
    is 1 where both are even. Equation 4 of Switch Transformer (Fedus et al. 2021), here over real
    tokens only, and for top-k over all assignments.
    """
    if not layers:
        empty, none = jnp.zeros((0,)), jnp.zeros((0,), jnp.int32)
        load, assignments = jnp.zeros((0, 0)), jnp.zeros((0, 0), jnp.int32)
        health = RouterHealth(assignments, load, empty, empty, none, jnp.int32(0))
        return jnp.float32(0), health
    stacked = [(_balance(stats), _health(stats)) for stats in layers]
    balance, health = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked)
    return balance.mean(), health._replace(dropped=health.dropped.sum())


def router_z(layers: tuple[RouterStats, ...]) -> Float[Array, ""]:
    """The routers' z-loss, mean over MoE layers; 0 if there are none.

    A layer's loss is the mean over real tokens of the squared log-sum-exp of the router's logits:
    equation 5 of ST-MoE (Zoph et al. 2022).
    """
    return jnp.stack([stats.z for stats in layers]).mean() if layers else jnp.float32(0)


def router_metrics(z: Float[Array, ""], health: RouterHealth) -> dict[str, jax.Array]:
    """What is recorded of routers: the worst layer's health and each load; nothing without any.

    `ASSIGNMENTS` is for the step, which does not record it.

    Args:
        z: the routers' z-loss.
    """
    if not len(health.peak):
        return {}
    return {
        "router_z_loss": z,
        "router_peak": health.peak.max(),
        "router_entropy": health.entropy.min(),
        "router_load": health.load,
        "router_dead": health.dead.sum().astype(jnp.float32),  # a mean, where batches make a step
        "dropped": health.dropped,
        ASSIGNMENTS: health.assignments,
    }


def _balance(stats: RouterStats) -> Float[Array, ""]:
    """A layer's load-balance loss; only mean probabilities have a gradient."""
    return stats.assignments.shape[0] * jnp.sum(stats.load * stats.mean_probability)


def _health(stats: RouterStats) -> RouterHealth:
    dead = jnp.sum(stats.assignments == 0)
    spread = stats.assignments, stats.load, stats.entropy, stats.peak
    return RouterHealth(*spread, dead, stats.dropped)
