"""Direct preference optimization (Rafailov et al., arXiv 2305.18290) and its relatives.

A pair of answers to one prompt lies in one row, as two segments: 2i + 1 is the chosen answer of the
row's pair i, with its prompt, and 2i + 2 the rejected one. So both have the same padding, and their
log-probabilities are sums over segments.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Objective = Literal["sigmoid", "ipo", "hinge"]


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
    objective: Objective = "sigmoid",
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
