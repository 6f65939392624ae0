"""What a step of the engine computes, and how the host reads it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.compilation import KEEP_ROUNDINGS
from jaxmoe.config import Llama4Config
from jaxmoe.generation import vocab_logprobs
from jaxmoe.generation.batches import Batch
from jaxmoe.generation.completion import Completion
from jaxmoe.generation.features import without_references
from jaxmoe.generation.head_drafts import Guesses
from jaxmoe.generation.request import given_sampling
from jaxmoe.generation.rows import Row
from jaxmoe.generation.sampler import Chosen
from jaxmoe.generation.sampling import NO_TOKEN
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
    guesses: Guesses | None
    scored: list[Scored]
    logprobs: vocab_logprobs.Logprobs | None


def score(
    config: Llama4Config,
    params: dict,
    top: int,
    completion_of: Callable[[Row], Completion],
    batch: Batch,
    hidden: Float[Array, "L S D"],
) -> tuple[list[Scored], vocab_logprobs.Logprobs | None]:
    """Starts to compute the log-probabilities of prompts' tokens that are asked for.

    Args:
        top: how many are told of each place.
        completion_of: a row's answer.
        hidden: the decoder's output at the step's tokens.
    """
    targets, scored = np.full(batch.inputs.tokens.size, NO_TOKEN, np.int32), []
    for row, start, first, count in batch.read:
        if row.request is None or given_sampling(row.request).prompt_logprobs is None:
            continue
        following = without_references(config, row.tokens[first + 1 : first + 1 + count])
        targets[start : start + len(following)] = following
        scored.append(Scored(completion_of(row), start, len(following)))
    if not scored:
        return [], None
    return scored, prompt_logprobs(config, params, hidden, targets, top)


def push_scores(unread: Unread) -> None:
    """Gives answers the log-probabilities of their prompts' tokens."""
    logprobs = jax.tree.map(np.asarray, unread.logprobs)
    for completion, start, count in unread.scored:
        part = slice(start, start + count)
        tops = map(pairs, logprobs.top_ids[part], logprobs.top_logprobs[part])
        completion.push_prompt(logprobs.logprob[part].tolist(), list(tops))


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
