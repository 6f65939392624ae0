"""Direct preference optimization (Rafailov et al., arXiv 2305.18290) and its relatives.

A pair of answers to one prompt lies in one row, as two segments: 2i + 1 is the chosen answer of the
row's pair i, with its prompt, and 2i + 2 the rejected one. So both have the same padding, and their
log-probabilities are sums over segments.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, UInt8

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.model.lora import adding_nothing, is_lora
from jaxmoe.model.moe import RouterStats
from jaxmoe.model.remat import Remat
from jaxmoe.model.transformer import forward, positions_of
from jaxmoe.train.config import PreferenceConfig
from jaxmoe.train.cross_entropy import token_losses
from jaxmoe.train.loss import (
    Loss,
    by_source,
    features_of,
    mean,
    next_tokens,
    text_of,
)
from jaxmoe.train.router_losses import router_losses, router_metrics, router_z
from jaxmoe.train.step import TARGETS


class PreferenceBatch(NamedTuple):
    """Rows for `preference_loss`.

    Attributes:
        tokens: of the answers, each after its prompt.
        segment_ids: 2i + 1 for the chosen and 2i + 2 for the rejected answer of a row's pair i.
        learned: the tokens of the answers, without their prompts.
        document: the number of each pair among all; -1 for none.
        reference: the reference's log-probabilities in nats of the chosen and the rejected answer;
            None if the reference is the model without what its adapters add.
        source: which of several sources each pair is of; None of one.
        pixels: of tiles of pictures, as in a `PictureBatch`; both answers refer to the same.
    """

    tokens: Integer[np.ndarray, "rows length"]
    segment_ids: Integer[np.ndarray, "rows length"]
    learned: Bool[np.ndarray, "rows length"]
    document: Integer[np.ndarray, "rows pairs"]
    reference: Float[np.ndarray, "rows pairs 2"] | None = None
    source: Integer[np.ndarray, "rows pairs"] | None = None
    pixels: UInt8[np.ndarray, "tiles side side 3"] | None = None


class Pairs(NamedTuple):
    """Log-probabilities in nats of the two answers of each pair.

    Attributes:
        chosen, rejected: sums over an answer's tokens.
        real: which pairs there are; rows hold different numbers of them.
    """

    chosen: Float[Array, "B pairs"]
    rejected: Float[Array, "B pairs"]
    real: Bool[Array, "B pairs"]


def answer_log_probabilities(
    nats: Float[Array, "B S"],
    targets: Bool[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    pairs: int,
) -> Pairs:
    """Sums each answer's log-probabilities.

    Args:
        nats: -log p of each token's successor.
        targets: the successors that count: those of the answers, not of the prompts.
        segment_ids: 2i + 1 and 2i + 2 for pair i of a row; 0 is padding.
        pairs: the most that a row holds.
    """
    counted = jnp.where(targets, segment_ids, 0)
    is_answer = counted[..., None] == jnp.arange(1, 2 * pairs + 1)
    sums = -jnp.sum(jnp.where(is_answer, nats[..., None], 0.0), axis=1)
    there = is_answer.any(1)
    return Pairs(sums[:, 0::2], sums[:, 1::2], there[:, 0::2] & there[:, 1::2])


def pair_losses(
    policy: Pairs,
    reference: Pairs,
    beta: float,
    objective: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Float[Array, "B pairs"]:
    """The loss of each pair.

    With h the policy's log ratio of chosen to rejected less the reference's:

    - "sigmoid": -log sigmoid(beta h), equation 7 of DPO; with label smoothing e, the share of pairs
      that are labelled wrongly, -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).
    - "ipo": (h - 1 / (2 beta))^2, equation 17 of Azar et al., arXiv 2310.12036.
    - "hinge": max(0, 1 - beta h), of SLiC (Zhao et al., arXiv 2305.10425).
    """
    h = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
    return _OBJECTIVES[objective](h, beta, label_smoothing)


def _sigmoid(h: jax.Array, beta: float, smoothing: float) -> jax.Array:
    right, wrong = jax.nn.log_sigmoid(beta * h), jax.nn.log_sigmoid(-beta * h)
    return -(1 - smoothing) * right - smoothing * wrong


_OBJECTIVES: dict[str, Callable] = {
    "sigmoid": _sigmoid,
    "ipo": lambda h, beta, _: (h - 1 / (2 * beta)) ** 2,
    "hinge": lambda h, beta, _: jax.nn.relu(1 - beta * h),
}


def pair_metrics(policy: Pairs, reference: Pairs, beta: float) -> dict[str, Float[Array, ""]]:
    """Means over pairs, named as TRL's DPOTrainer names them.

    A reward is beta times the policy's log-probability of an answer less the reference's.
    """
    chosen = beta * (policy.chosen - reference.chosen)
    rejected = beta * (policy.rejected - reference.rejected)
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }
    return {name: mean_of_pairs(value, policy.real) for name, value in values.items()}


def mean_of_pairs(x: Float[Array, "B pairs"], real: Bool[Array, "B pairs"]) -> Float[Array, ""]:
    """The mean over the pairs that are there; 0 if there are none."""
    return jnp.sum(jnp.where(real, x, 0.0)) / jnp.maximum(jnp.sum(real), 1)


class Answers(NamedTuple):
    """What a model says of a batch of pairs.

    Attributes:
        pairs: the log-probabilities of the answers.
        sft: the mean cross entropy of the chosen ones, in nats a token.
        z: the mean squared log-sum-exp of the logits at all answers' tokens.
        router_stats: of the MoE layers.
    """

    pairs: Pairs
    sft: Float[Array, ""]
    z: Float[Array, ""]
    router_stats: tuple[RouterStats, ...]


def preference_loss(
    wanted: PreferenceConfig,
    router_loss: float = 0.0,
    remat: Remat = False,
    forward: Callable = forward,
    *,
    z_loss: float = 0.0,
    router_z_loss: float = 0.0,
    sources: Sequence[str] = (),
) -> Loss:
    """The loss of `train` for pairs of answers, whose batches are `PreferenceBatch`.

    Its metric `targets`, the weight of a batch, is its number of pairs.

    Args:
        wanted: the objective.
        router_loss, remat, forward, z_loss, router_z_loss, sources: as for
            `jaxmoe.train.loss.losses`; of a source the pairs' loss is recorded.
    """

    def loss(model: Llama4Config, params: dict, batch: Any) -> tuple[jax.Array, dict]:
        batch = jax.tree.map(jnp.asarray, PreferenceBatch(*batch))
        features = None
        if batch.pixels is not None:
            features = features_of(model, params, batch.pixels, remat)  # pyrefly: ignore
        policy, sft, z, stats = answers(model, params, batch, remat, forward, features)
        reference = _reference(model, params, batch, policy, forward, features)
        options = wanted.beta, wanted.objective, wanted.label_smoothing
        each = pair_losses(policy, reference, *options)
        found = mean_of_pairs(each, policy.real)
        balance, health = router_losses(stats)
        of_routers = router_z(stats)
        targets = jnp.sum(policy.real, dtype=jnp.float32)
        recorded = {"loss": found, "sft_loss": sft, "z_loss": z, "balance_loss": balance}
        recorded |= {TARGETS: targets, **pair_metrics(policy, reference, wanted.beta)}
        if batch.source is not None:
            recorded |= by_source(each, policy.real, batch.source, sources)  # pyrefly: ignore
        total = found + wanted.sft_loss * sft + z_loss * z
        total += router_loss * balance + router_z_loss * of_routers
        return total, recorded | router_metrics(of_routers, health)

    return loss


def answers(
    model: Llama4Config,
    params: dict,
    batch: PreferenceBatch,
    remat: Remat = False,
    forward: Callable = forward,
    features: Float[Array, "N D"] | None = None,
) -> Answers:
    """Runs the model on a batch's answers.

    Args:
        features: of the batch's pictures; None computes them, if there are any.
    """
    tokens, learned, given = batch.tokens, batch.learned, {}
    if batch.pixels is not None:
        if features is None:
            features = features_of(model, params, batch.pixels, remat)  # pyrefly: ignore
        given = {"features": features}
        tokens, learned = text_of(model, tokens, learned)  # pyrefly: ignore
    positions = positions_of(batch.segment_ids)  # pyrefly: ignore  # traced arrays, as below
    rows = batch.tokens, positions, batch.segment_ids
    out = forward(model, params, *rows, remat=remat, **given)
    targets, real = next_tokens(tokens, batch.segment_ids, learned)  # pyrefly: ignore
    found = token_losses(model, params, out.hidden, targets)
    rows = real, batch.segment_ids, batch.document.shape[1]
    pairs = answer_log_probabilities(found.nats, *rows)  # pyrefly: ignore
    sft = mean(found.nats, real & (batch.segment_ids % 2 == 1))  # pyrefly: ignore
    return Answers(pairs, sft, mean(found.log_sum_exp**2, real), out.router_stats)


def _reference(
    model: Llama4Config,
    params: dict,
    batch: PreferenceBatch,
    policy: Pairs,
    forward: Callable,
    features: Float[Array, "N D"] | None,
) -> Pairs:
    """The reference's log-probabilities, as the batch has them or with adapters that add nothing.

    The adapters stay in place, so that the reference is rounded where the policy is. The policy's
    features of pictures are its own too, unless the tower has adapters.
    """
    if batch.reference is not None:
        chosen, rejected = batch.reference[..., 0], batch.reference[..., 1]
        return Pairs(chosen, rejected, policy.real)  # pyrefly: ignore  # traced arrays
    if not _has_adapters(params):
        raise UserError(
            "pairs need a reference: train adapters, or let `train` read the pairs from the "
            "config's data, which computes one."
        )
    frozen = jax.lax.stop_gradient(adding_nothing(params))
    shared = None if features is None or _has_adapters(params["vision"]) else features
    shared = jax.lax.stop_gradient(shared)
    return answers(model, frozen, batch, forward=forward, features=shared).pairs


def _has_adapters(params: dict) -> bool:
    return any(map(is_lora, jax.tree.leaves(params, is_leaf=is_lora)))
