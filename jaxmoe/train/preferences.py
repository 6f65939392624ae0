"""Direct preference optimization (Rafailov et al., arXiv 2305.18290) and its relatives.

A pair of answers to one prompt lies in one row, as two segments: 2i + 1 is the chosen answer of the
row's pair i, with its prompt, and 2i + 2 the rejected one. So both have the same padding, and their
log-probabilities are sums over segments.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxmoe.config import Llama4Config
from jaxmoe.model.lora import without_adapters
from jaxmoe.model.remat import Remat
from jaxmoe.model.transformer import forward, positions_of
from jaxmoe.train.config import PreferenceConfig
from jaxmoe.train.cross_entropy import token_losses
from jaxmoe.train.loss import Loss, mean, next_tokens


class PreferenceBatch(NamedTuple):
    """Rows for `preference_loss`.

    Attributes:
        tokens: of the answers, each after its prompt.
        segment_ids: 2i + 1 for the chosen and 2i + 2 for the rejected answer of a row's pair i.
        learned: the tokens of the answers, without their prompts.
        document: the number of each pair among all; -1 for none.
        reference: the reference's log-probabilities in nats of the chosen and the rejected answer;
            None if the reference is the model without its adapters.
    """

    tokens: Integer[np.ndarray, "rows length"]
    segment_ids: Integer[np.ndarray, "rows length"]
    learned: Bool[np.ndarray, "rows length"]
    document: Integer[np.ndarray, "rows pairs"]
    reference: Float[np.ndarray, "rows pairs 2"] | None = None


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
    sums = -jnp.einsum("BS,BSn->Bn", nats, is_answer.astype(nats.dtype))
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


def preference_loss(
    wanted: PreferenceConfig, remat: Remat = False, forward: Callable = forward
) -> Loss:
    """The loss of `train` for pairs of answers, whose batches are `PreferenceBatch`.

    Args:
        wanted: the objective.
        remat, forward: as for `jaxmoe.train.loss.losses`.
    """

    def loss(model: Llama4Config, params: dict, batch: Any) -> tuple[jax.Array, dict]:
        batch = jax.tree.map(jnp.asarray, PreferenceBatch(*batch))
        policy, sft = log_probabilities(model, params, batch, remat, forward)
        reference = _reference(model, params, batch, policy, forward)
        options = wanted.beta, wanted.objective, wanted.label_smoothing
        found = mean_of_pairs(pair_losses(policy, reference, *options), policy.real)
        recorded = {"loss": found, "sft_loss": sft, "targets": jnp.sum(policy.real)}
        recorded |= pair_metrics(policy, reference, wanted.beta)
        return found + wanted.sft_loss * sft, recorded

    return loss


def log_probabilities(
    model: Llama4Config, params: dict, batch: Any, remat: Remat = False, forward: Callable = forward
) -> tuple[Pairs, Float[Array, ""]]:
    """The log-probabilities of a batch's answers, and the mean cross entropy of the chosen ones."""
    tokens, segment_ids, learned, document, _ = batch
    positions = positions_of(segment_ids)
    out = forward(model, params, tokens, positions, segment_ids, remat=remat)
    targets, real = next_tokens(tokens, segment_ids, learned)
    nats = token_losses(model, params, out.hidden, targets).nats
    pairs = answer_log_probabilities(nats, real, segment_ids, document.shape[1])
    return pairs, mean(nats, real & (segment_ids % 2 == 1))


def _reference(
    model: Llama4Config, params: dict, batch: Any, policy: Pairs, forward: Callable
) -> Pairs:
    """The reference's log-probabilities, as the batch has them or without the adapters."""
    if batch.reference is None:
        frozen = jax.lax.stop_gradient(without_adapters(params))
        return log_probabilities(model, frozen, batch, forward=forward)[0]
    return Pairs(batch.reference[..., 0], batch.reference[..., 1], policy.real)
