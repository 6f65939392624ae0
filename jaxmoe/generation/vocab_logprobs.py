"""Log-probabilities of tokens, and the largest of each row, with the vocabulary sharded."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmoe import mesh as meshes
from jaxmoe.generation.sampling import NO_TOKEN
from jaxmoe.generation.vocab import (
    Part,
    is_finite,
    largest_few,
    pad_logits,
    specs,
    this_part,
    total_mass,
)

SLICE = 256  # tokens of a prompt whose logits are held at once


class Logprobs(NamedTuple):
    """Natural logarithms of the model's probabilities, before any setting of sampling.

    Where a row's logits are not finite, numbers are NaN and tokens `NO_TOKEN`.

    Attributes:
        logprob: [B], of one token a row; NaN where that is `NO_TOKEN`.
        top_ids: [B, n], the n most probable tokens, the lower id first of equal ones.
        top_logprobs: [B, n], theirs.
    """

    logprob: Float[Array, "B"]
    top_ids: Int[Array, "B n"]
    top_logprobs: Float[Array, "B n"]


def prompt_logprobs(
    logits_of: Callable[[Float[Array, "n D"]], Float[Array, "n V"]],
    hidden: Float[Array, "S D"],
    targets: Int[Array, "S"],
    top: int,
    *,
    size: int = SLICE,
) -> Logprobs:
    """The log-probability of each target, and the `top` largest beside it; see `Logprobs`.

    Args:
        logits_of: `unembed` with the config and parameters.
        hidden: the decoder's output.
        targets: the token after each; `NO_TOKEN` for none.
        top: 0 or more, at most the vocabulary.
        size: tokens whose logits are held at once.
    """
    length = len(targets)
    size = min(size, length)
    extra = -length % size
    hidden = jnp.pad(hidden, ((0, extra), (0, 0))).reshape(-1, size, hidden.shape[-1])
    targets = jnp.pad(targets, (0, extra), constant_values=NO_TOKEN).reshape(-1, size)
    found = lax.map(lambda part: logprobs(logits_of(part[0]), part[1], top), (hidden, targets))
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])[:length], found)


def logprobs(logits: Float[Array, "B V"], tokens: Int[Array, "B"], top: int) -> Logprobs:
    """The log-probability of a token of each row, and the `top` largest; see `Logprobs`."""

    def body(logits, tokens):
        part = this_part(size, logits.shape[-1])
        return part_logprobs(part, logits, tokens, is_finite(part, logits), top)

    size, logits = logits.shape[-1], pad_logits(logits)
    spec, by_row, _ = specs(logits)
    return meshes.per_device(body, (spec, by_row), by_row)(logits, tokens)


def part_logprobs(
    part: Part,
    logits: Float[Array, "B L"],
    tokens: Int[Array, "B"],
    finite: Bool[Array, "B"],
    top: int,
) -> Logprobs:
    """`logprobs` on a device that has a part of the vocabulary.

    Args:
        finite: rows whose logits all are.
    """
    highest, _ = part.largest(logits)
    log = jnp.log(total_mass(part, jnp.exp(logits - highest[:, None])))
    values, ids = largest_few(part, logits, top)
    # First the difference of logits, which is exact where they are close.
    values = values - highest[:, None] - log[:, None]
    return Logprobs(
        jnp.where(finite, part.at(logits, tokens) - highest - log, jnp.nan),
        jnp.where(finite[:, None], ids, NO_TOKEN),
        jnp.where(finite[:, None], values, jnp.nan),
    )
