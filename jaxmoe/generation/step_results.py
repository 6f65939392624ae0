"""What a step of the engine computes, and how the host reads it."""

import functools
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from jaxmoe.compilation import KEEP_ROUNDINGS
from jaxmoe.config import Llama4Config
from jaxmoe.generation import vocab_logprobs
from jaxmoe.generation.batches import Batch
from jaxmoe.generation.completion import Completion
from jaxmoe.generation.sampler import Chosen
from jaxmoe.mesh import on_all_devices
from jaxmoe.model.transformer import unembed


class Scored(NamedTuple):
    """Tokens of a prompt in a step whose log-probabilities are asked for.

    Attributes:
        start: the place of the first, among all of the step's tokens.
        count: how many of them are followed by another token of the prompt.
    """

    completion: Completion
    start: int
    count: int


class Unread(NamedTuple):
    """A step whose results are still on the devices, and whose they are."""

    batch: Batch
    chosen: Chosen | None
    scored: list[Scored]
    logprobs: vocab_logprobs.Logprobs | None


@functools.partial(jax.jit, static_argnames=("config", "top"), compiler_options=KEEP_ROUNDINGS)
def prompt_logprobs(
    config: Llama4Config,
    params: dict,
    hidden: Float[Array, "L S D"],
    targets: Int[Array, "T"],
    top: int,
) -> vocab_logprobs.Logprobs:
    """Log-probabilities of the tokens that follow each of a step's T = L * S tokens."""
    logits_of = functools.partial(unembed, config, params)
    found = vocab_logprobs.prompt_logprobs(
        logits_of, hidden.reshape(-1, hidden.shape[-1]), targets, top
    )
    return jax.tree.map(on_all_devices, found)


def logprobs_of(chosen: Chosen, i: int) -> tuple:
    """The log-probability of a chosen token, and those of the likeliest, if they were asked for."""
    if chosen.logprob is None or chosen.top_ids is None or chosen.top_logprobs is None:
        return ()
    return float(chosen.logprob[i]), pairs(chosen.top_ids[i], chosen.top_logprobs[i])


def pairs(ids: Any, logprobs: Any) -> list[tuple[int, float]]:
    """Tokens and their log-probabilities, of arrays [n], as Python's numbers."""
    return list(zip(ids.tolist(), logprobs.tolist(), strict=True))
