"""Losses of training, and measures of the routers' health.

Shape letters: B rows, S tokens a row, V vocabulary, L MoE layers, E experts, k experts a token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxmoe.config import Llama4Config
from jaxmoe.model.moe import RouterStats
from jaxmoe.model.remat import Remat
from jaxmoe.model.transformer import forward, positions_of, unembed
from jaxmoe.model.vision import tile_features
from jaxmoe.train.data import Batch

Loss = Callable[[Llama4Config, dict, Any], tuple[jax.Array, dict[str, jax.Array]]]


class RouterHealth(NamedTuple):
    """How the tokens spread over the experts of each MoE layer; padding does not count."""

    load: Float[Array, "L E"]  # fraction of the assignments that each expert gets
    entropy: Float[Array, "L"]  # of the router's softmax, mean over tokens, in nats
    peak: Float[Array, "L"]  # the largest load over the mean load: 1 is even, E is collapse
    dropped: Int[Array, ""]  # assignments that reached no expert


class Losses(NamedTuple):
    """One batch's losses; `total` is what the gradient is taken of."""

    total: Float[Array, ""]
    cross_entropy: Float[Array, ""]  # nats a target, mean
    balance: Float[Array, ""]  # load-balance loss, mean over MoE layers
    right: Float[Array, ""]  # the share of targets that are the likeliest token
    health: RouterHealth


def losses(
    config: Llama4Config,
    params: dict,
    tokens: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    router_loss: float,
    remat: Remat = False,
    forward: Callable = forward,
    learned: Bool[Array, "B S"] | None = None,
    features: Float[Array, "N D"] | None = None,
) -> Losses:
    """Runs the model and its losses.

    Args:
        router_loss: scales the load-balance loss.
        remat: as for `forward`.
        forward: `jaxmoe.forward`, or a fork's function of the same arguments.
        learned: the tokens that are targets; default: all.
        features: of images, as for `forward`. Their places are no targets.
    """
    positions = positions_of(segment_ids)
    given = {} if features is None else {"features": features}
    out = forward(config, params, tokens, positions, segment_ids, remat=remat, **given)
    logits = unembed(config, params, out.hidden)
    if features is not None:
        is_text = tokens < config.vocab_size
        learned = is_text if learned is None else learned & is_text
        tokens = jnp.where(is_text, tokens, config.image_token_id)
    total, count = cross_entropy_sum(logits, tokens, segment_ids, learned)
    cross_entropy = total / jnp.maximum(count, 1)
    targets, real = next_tokens(tokens, segment_ids, learned)
    right = jnp.sum((jnp.argmax(logits, -1) == targets) & real) / jnp.maximum(count, 1)
    balance, health = router_losses(out.router_stats)
    total = cross_entropy + router_loss * balance
    return Losses(total, cross_entropy, balance, right, health)


def next_token_loss(
    router_loss: float = 0.0, remat: Remat = False, forward: Callable = forward
) -> Loss:
    """The loss of `train` that predicts each next token; arguments as for `losses`.

    Its batches are `jaxmoe.train.data.Batch`, and its metrics what the records of a run hold.
    """

    def loss(model: Llama4Config, params: dict, batch: Any) -> tuple[jax.Array, dict]:
        tokens, segment_ids, learned = Batch(*batch)
        rows = jnp.asarray(tokens), jnp.asarray(segment_ids), router_loss, remat, forward
        found = losses(model, params, *rows, learned=learned)
        return found.total, metrics(found)

    return loss


def picture_loss(
    router_loss: float = 0.0,
    remat: Remat = False,
    forward: Callable = forward,
    encode: Callable = tile_features,
) -> Loss:
    """The loss of `train` for conversations with pictures, which runs the vision tower, too.

    Its batches are `jaxmoe.train.pictures.PictureBatch`. A tower that is not trained, as
    `trainable=lambda name: not name.startswith("vision.")` says, costs no backward pass.

    Args:
        router_loss, forward: as for `losses`.
        remat: recompute layers of the decoder and of the tower in the backward pass.
        encode: `tile_features`, or a fork's function of the same arguments.
    """

    def loss(model: Llama4Config, params: dict, batch: Any) -> tuple[jax.Array, dict]:
        tokens, segment_ids, learned, pixels = map(jnp.asarray, batch)
        features = encode(model, params["vision"], pixels, remat)
        features = features.reshape(-1, features.shape[-1])
        rows = tokens, segment_ids, router_loss, remat, forward
        found = losses(model, params, *rows, learned=learned, features=features)
        return found.total, metrics(found) | {"right": found.right}

    loss.trains_vision = True  # pyrefly: ignore  # an attribute, which `train` asks for
    return loss


def metrics(found: Losses) -> dict[str, jax.Array]:
    """What is recorded of a batch: its losses, and of the routers the worst and each load."""
    health = found.health
    recorded = {"loss": found.cross_entropy, "balance_loss": found.balance}
    if len(health.peak):
        recorded["router_peak"] = health.peak.max()
        recorded["router_entropy"] = health.entropy.min()
        recorded["router_load"] = health.load
        recorded["dropped"] = health.dropped
    return recorded


def summed_cross_entropy(
    config: Llama4Config,
    params: dict,
    hidden: Float[Array, "B S D"],
    tokens: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    learned: Bool[Array, "B S"] | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The readout of a step that returns what `cross_entropy_sum` does."""
    return cross_entropy_sum(unembed(config, params, hidden), tokens, segment_ids, learned)


def next_tokens(
    tokens: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    learned: Bool[Array, "B S"] | None = None,
) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """Each token's successor, and whether it is a target: real, of the same segment, and learned.

    Args:
        learned: the tokens that may be targets; default: all.
    """
    following, targets = (_shifted(x) for x in (segment_ids, tokens))
    real = (following == segment_ids) & (segment_ids != 0)
    return targets, real if learned is None else real & _shifted(learned)


def _shifted(x: Shaped[Array, "B S"]) -> Shaped[Array, "B S"]:
    """What follows each place of a row; 0 after the last."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


def cross_entropy_sum(
    logits: Float[Array, "B S V"],
    tokens: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    learned: Bool[Array, "B S"] | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The cross entropy of the targets of `next_tokens`, summed in float32, and their number."""
    targets, real = next_tokens(tokens, segment_ids, learned)
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(real, nats, 0.0)), jnp.sum(real)


def router_losses(layers: tuple[RouterStats, ...]) -> tuple[Float[Array, ""], RouterHealth]:
    """The load-balance loss, mean over MoE layers (0 if there are none), and the routers' health.

    A layer's loss is E * sum_e(fraction of assignments to e * mean softmax probability of e), which
    is 1 where both are even. Equation 4 of Switch Transformer (Fedus et al. 2021), here over real
    tokens only, and for top-k over all assignments.
    """
    if not layers:
        empty = jnp.zeros((0,))
        return jnp.float32(0), RouterHealth(jnp.zeros((0, 0)), empty, empty, jnp.int32(0))
    stacked = [(_balance(stats), _health(stats)) for stats in layers]
    balance, health = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked)
    return balance.mean(), health._replace(dropped=health.dropped.sum())


def _balance(stats: RouterStats) -> Float[Array, ""]:
    """A layer's load-balance loss; only mean probabilities have a gradient."""
    return stats.assignments.shape[0] * jnp.sum(stats.load * stats.mean_probability)


def _health(stats: RouterStats) -> RouterHealth:
    return RouterHealth(stats.load, stats.entropy, stats.peak, stats.dropped)
