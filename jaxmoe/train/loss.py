"""What training minimizes, and how the routers are doing.

Shape letters: B rows, S tokens a row, V vocabulary, L MoE layers, E experts, k experts a token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.config import Llama4Config
from jaxmoe.model.moe import Routing
from jaxmoe.model.transformer import forward, positions_of, unembed


class RouterHealth(NamedTuple):
    """How the tokens spread over the experts of each MoE layer; padding does not count."""

    load: Float[Array, "L E"]  # fraction of the assignments that each expert gets
    entropy: Float[Array, "L"]  # of the router's softmax, mean over tokens, in nats
    peak: Float[
        Array, "L"
    ]  # the busiest expert's load over the mean load: 1 is even, E is collapse
    dropped: Int[Array, ""]  # assignments that reached no expert


class Losses(NamedTuple):
    """One batch's losses; `total` is what the gradient is taken of."""

    total: Float[Array, ""]
    cross_entropy: Float[Array, ""]  # nats a target, mean
    balance: Float[Array, ""]  # load-balance loss, mean over MoE layers
    health: RouterHealth


def losses(
    config: Llama4Config,
    params: dict,
    tokens: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    router_loss: float,
    remat: bool = False,
) -> Losses:
    """Runs the model and its losses; `router_loss` scales the load-balance loss."""
    positions = positions_of(segment_ids)
    out = forward(config, params, tokens, positions, segment_ids, remat=remat)
    total, count = cross_entropy_sum(unembed(config, params, out.hidden), tokens, segment_ids)
    cross_entropy = total / jnp.maximum(count, 1)
    balance, health = router_losses(out.routing, segment_ids != 0)
    return Losses(cross_entropy + router_loss * balance, cross_entropy, balance, health)


def next_tokens(
    tokens: Int[Array, "B S"], segment_ids: Int[Array, "B S"]
) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """Each token's successor, and whether it is one: real, and of the same segment."""
    following = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    return targets, (following == segment_ids) & (segment_ids != 0)


def cross_entropy_sum(
    logits: Float[Array, "B S V"], tokens: Int[Array, "B S"], segment_ids: Int[Array, "B S"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The cross entropy of all next tokens, summed in float32, and their number."""
    targets, real = next_tokens(tokens, segment_ids)
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(real, nats, 0.0)), jnp.sum(real)


def router_losses(
    routing: tuple[Routing, ...], real: Bool[Array, "B S"]
) -> tuple[Float[Array, ""], RouterHealth]:
    """The load-balance loss, mean over MoE layers (0 if there are none), and the routers' health.

    A layer's loss is E * sum_e(fraction of assignments to e * mean softmax probability of e), which
    is 1 where both are even. Equation 4 of Switch Transformer (Fedus et al. 2021), here over real
    tokens only, and for top-k over all assignments.
    """
    if not routing:
        empty = jnp.zeros((0,))
        return jnp.float32(0), RouterHealth(jnp.zeros((0, 0)), empty, empty, jnp.int32(0))
    layers = [_layer_balance(layer, real) for layer in routing]
    balance, health = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return balance.mean(), health._replace(dropped=health.dropped.sum())


def _layer_balance(
    routing: Routing, real: Bool[Array, "B S"]
) -> tuple[Float[Array, ""], RouterHealth]:
    E, k = routing.logits.shape[-1], routing.expert.shape[-1]
    wanted = k * jnp.sum(real)
    counts = jnp.sum(jax.nn.one_hot(routing.expert, E, dtype=jnp.int32), axis=(0, 1, 2))
    load = counts / jnp.maximum(wanted, 1)
    log_p = jax.nn.log_softmax(routing.logits.astype(jnp.float32))
    p = jnp.exp(log_p)
    balance = E * jnp.sum(load * _mean_of_real(p, real))
    entropy = _mean_of_real(-jnp.sum(p * log_p, axis=-1), real)
    return balance, RouterHealth(load, entropy, load.max() * E, wanted - counts.sum())


def _mean_of_real(x: Float[Array, "B S *rest"], real: Bool[Array, "B S"]) -> Float[Array, "*rest"]:
    mask = real.reshape(*real.shape, *(1,) * (x.ndim - 2))
    return jnp.sum(jnp.where(mask, x, 0.0), axis=(0, 1)) / jnp.maximum(jnp.sum(real), 1)
