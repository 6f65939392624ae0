"""Losses of training: next tokens' cross entropy, and what is added to it.

Shape letters: B rows, S tokens a row, D embed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from jaxmoe.config import Llama4Config
from jaxmoe.model.remat import Remat
from jaxmoe.model.transformer import forward, positions_of
from jaxmoe.model.vision import tile_features
from jaxmoe.train.cross_entropy import token_losses
from jaxmoe.train.data import Batch
from jaxmoe.train.router_losses import RouterHealth, router_losses, router_metrics, router_z

Loss = Callable[[Llama4Config, dict, Any], tuple[jax.Array, dict[str, jax.Array]]]


class Losses(NamedTuple):
    """One batch's losses; `total` is what the gradient is taken of."""

    total: Float[Array, ""]
    cross_entropy: Float[Array, ""]  # nats a target, mean
    balance: Float[Array, ""]  # load-balance loss, mean over MoE layers
    z: Float[Array, ""]  # squared log-sum-exp of the logits, mean over targets
    router_z: Float[Array, ""]  # likewise of the routers' logits, mean over tokens and MoE layers
    right: Float[Array, ""]  # the share of targets that are the likeliest token
    targets: Int[Array, ""]  # how many there are
    health: RouterHealth
    by_source: dict[str, jax.Array]  # each source's cross entropy and targets, to record


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
    *,
    z_loss: float = 0.0,
    router_z_loss: float = 0.0,
    source: Int[Array, "B S"] | None = None,
    sources: Sequence[str] = (),
) -> Losses:
    """Runs the model and its losses.

    Means are over this batch's targets. Of a batch that is computed in parts, the loss and its
    gradient are the parts' means, weighted by their `targets`; only the routers' losses, whose
    loads are counted within a part, are then not those of the whole.

    Args:
        router_loss: scales the load-balance loss.
        remat: as for `forward`.
        forward: `jaxmoe.forward`, or a fork's function of the same arguments.
        learned: the tokens that are targets; default: all.
        features: of images, as for `forward`. Their places are no targets.
        z_loss: scales the mean of targets' squared log-sum-exp, the z-loss of PaLM (Chowdhery et
            al. 2022, section 5).
        router_z_loss: scales the routers' z-loss.
        source: which of `sources` each token is of.
        sources: names of parts of the data, whose cross entropies are told apart.
    """
    positions = positions_of(segment_ids)
    given = {} if features is None else {"features": features}
    out = forward(config, params, tokens, positions, segment_ids, remat=remat, **given)
    if features is not None:
        tokens, learned = text_of(config, tokens, learned)
    targets, real = next_tokens(tokens, segment_ids, learned)
    found = token_losses(config, params, out.hidden, targets)
    cross_entropy, z = mean(found.nats, real), mean(found.log_sum_exp**2, real)
    balance, health = router_losses(out.router_stats)
    of_routers = router_z(out.router_stats)
    total = cross_entropy + z_loss * z + router_loss * balance + router_z_loss * of_routers
    right, count = mean(found.right, real), jnp.sum(real)
    of_sources = {} if source is None else by_source(found.nats, real, source, sources)
    return Losses(total, cross_entropy, balance, z, of_routers, right, count, health, of_sources)


def next_token_loss(
    router_loss: float = 0.0,
    remat: Remat = False,
    forward: Callable = forward,
    *,
    z_loss: float = 0.0,
    router_z_loss: float = 0.0,
    sources: Sequence[str] = (),
) -> Loss:
    """The loss of `train` that predicts each next token; arguments as for `losses`.

    Its batches are `jaxmoe.train.data.Batch`, and its metrics what the records of a run hold.
    """

    def loss(model: Llama4Config, params: dict, batch: Any) -> tuple[jax.Array, dict]:
        tokens, segment_ids, learned, source = jax.tree.map(jnp.asarray, Batch(*batch))
        rows = tokens, segment_ids, router_loss, remat, forward
        options: dict[str, Any] = {"z_loss": z_loss, "router_z_loss": router_z_loss}
        options |= {"source": source, "sources": sources}
        found = losses(model, params, *rows, learned=learned, **options)
        return found.total, metrics(found)

    return loss


def picture_loss(
    router_loss: float = 0.0,
    remat: Remat = False,
    forward: Callable = forward,
    encode: Callable = tile_features,
    *,
    z_loss: float = 0.0,
    router_z_loss: float = 0.0,
    sources: Sequence[str] = (),
) -> Loss:
    """The loss of `train` for conversations with pictures, which runs the vision tower, too.

    Its batches are `jaxmoe.train.pictures.PictureBatch`. A tower that is not trained, as
    `trainable=lambda name: not name.startswith("vision.")` says, costs no backward pass.

    Args:
        router_loss, forward, z_loss, router_z_loss, sources: as for `losses`.
        remat: recompute layers of the decoder and of the tower in the backward pass.
        encode: `tile_features`, or a fork's function of the same arguments.
    """

    def loss(model: Llama4Config, params: dict, batch: Any) -> tuple[jax.Array, dict]:
        tokens, segment_ids, learned, pixels = map(jnp.asarray, batch[:4])
        features = features_of(model, params, pixels, remat, encode)
        rows = tokens, segment_ids, router_loss, remat, forward
        options: dict[str, Any] = {"z_loss": z_loss, "router_z_loss": router_z_loss}
        options |= {"source": getattr(batch, "source", None), "sources": sources}
        options["features"] = features
        found = losses(model, params, *rows, learned=learned, **options)
        return found.total, metrics(found) | {"right": found.right}

    loss.trains_vision = True  # pyrefly: ignore  # an attribute, which `train` asks for
    return loss


def features_of(
    config: Llama4Config,
    params: dict,
    pixels: UInt8[Array, "tiles side side 3"],
    remat: Remat = False,
    encode: Callable = tile_features,
) -> Float[Array, "N D"]:
    """The features of all tiles, one after the other; arguments as for `picture_loss`."""
    features = encode(config, params["vision"], pixels, remat)
    return features.reshape(-1, features.shape[-1])


def text_of(
    config: Llama4Config, tokens: Int[Array, "B S"], learned: Bool[Array, "B S"] | None
) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """Tokens with the image token at the places of features, and what is learned without these."""
    is_text = tokens < config.vocab_size
    learned = is_text if learned is None else learned & is_text
    return jnp.where(is_text, tokens, config.image_token_id), learned


def metrics(found: Losses) -> dict[str, jax.Array]:
    """What is recorded of a batch: its losses, and of the routers the worst and each load.

    `targets`, their number, is the weight of a batch's losses in a mean over batches.
    """
    recorded = {"loss": found.cross_entropy, "z_loss": found.z, **found.by_source}
    recorded |= {"balance_loss": found.balance, "targets": found.targets.astype(jnp.float32)}
    return recorded | router_metrics(found.router_z, found.health)


def targets_of(name: str, metrics: Mapping[str, Any]) -> Any:
    """How many targets a metric is a mean over: `loss/NAME` over those of a source.

    Where the metrics do not say, they count as one.
    """
    kind, _, source = name.partition("/")
    of_all = metrics.get("targets", 1.0)
    return metrics.get(f"targets/{source}", of_all) if kind == "loss" else of_all


def summed_cross_entropy(
    config: Llama4Config,
    params: dict,
    hidden: Float[Array, "B S D"],
    tokens: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    learned: Bool[Array, "B S"] | None = None,
    source: Int[Array, "B S"] | None = None,
    sources: Int[Array, "sources"] | None = None,
) -> tuple[Float[Array, "parts"], Int[Array, "parts"]]:
    """The cross entropy of the targets of `next_tokens`, summed in float32, and their number.

    A readout of `jaxmoe.model.steps.step`.

    Args:
        source: which source each token is of.
        sources: those that are told apart.

    Returns:
        Both of all targets, then of each source's.
    """
    targets, real = next_tokens(tokens, segment_ids, learned)
    nats = token_losses(config, params, hidden, targets).nats
    parts = [real]
    if source is not None and sources is not None:
        parts += [real & (source == one) for one in sources]
    sums = [jnp.sum(jnp.where(part, nats, 0.0)) for part in parts]
    return jnp.stack(sums), jnp.stack([jnp.sum(part) for part in parts])


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


def mean(x: Shaped[Array, "B S"], of: Bool[Array, "B S"]) -> Float[Array, ""]:
    """The mean of `x` where `of` says so, in float32; 0 if it says so nowhere."""
    return jnp.sum(jnp.where(of, x, 0), dtype=jnp.float32) / jnp.maximum(jnp.sum(of), 1)


def by_source(
    nats: Float[Array, "B S"],
    real: Bool[Array, "B S"],
    source: Int[Array, "B S"],
    sources: Sequence[str],
) -> dict[str, jax.Array]:
    """`loss/NAME`, the mean cross entropy of a source's targets, and `targets/NAME`, their number.

    Args:
        nats: of each place's target.
        real: which places have a target.
        source: which of `sources` a place's token is of; its target, of the same document, too.
    """
    found = {}
    for index, name in enumerate(sources):
        here = real & (source == index)
        found[f"loss/{name}"] = mean(nats, here)
        found[f"targets/{name}"] = jnp.sum(here)
    return found
