"""Choosing the next token: greedy, temperature, top-k, top-p.

A token's random numbers come from the seed, its request's id and its index in the answer, so they
depend neither on the other rows of a batch nor on the mesh.
"""

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from jaxmoe.errors import UserError
from jaxmoe.generation.grammar import Grammar
from jaxmoe.generation.sampling_checks import check_fields
from jaxmoe.generation_config import FILE, read_generation_config

NO_TOKEN = -1  # in place of a token, where the logits are not finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepetitionDetection:
    """Ends an answer whose last tokens are one pattern again and again, as vLLM does.

    Attributes:
        max_pattern_size: the longest pattern, in tokens.
        min_pattern_size: the shortest pattern, in tokens.
        min_count: how often the pattern must have come, at least twice.
    """

    max_pattern_size: int
    min_pattern_size: int = 1
    min_count: int

    def __post_init__(self):
        check_fields(self)
        if self.min_pattern_size > self.max_pattern_size:
            raise UserError(
                f"min_pattern_size {self.min_pattern_size} is above max_pattern_size "
                f"{self.max_pattern_size}; make it at most that."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the tokens of an answer, what ends it, and what is told about it.

    Lists, and a mapping as `logit_bias`, are accepted too, and kept as tuples.

    Attributes:
        temperature: divides the logits; 0 takes the largest.
        top_p: keeps a token while the probability of all larger ones is at most this.
        top_k: keeps this many tokens; 0 keeps all.
        min_p: keeps tokens of at least this fraction of the largest probability; 0 keeps all.
        seed: of the random numbers, with the request's id and the token's index.
        stop: texts that end the answer when they have appeared in it.
        stop_ids: tokens that end the answer, beside the model's own.
        ignore_eos: whether the model's own stop tokens do not end the answer.
        min_tokens: how many tokens come before one that ends the answer, or completes a text of
            `stop`.
        repetition_penalty: divides positive logits of tokens in the prompt or the answer so far,
            and multiplies negative ones; 1 is none.
        presence_penalty: is subtracted from the logits of tokens in the answer so far.
        frequency_penalty: is subtracted once for each time that the token is in the answer so far.
        logit_bias: pairs of a token and what is added to its logit.
        allowed_ids: the only tokens that may come, stop tokens included; None allows all.
        logprobs: how many of the likeliest tokens are reported at each token of the answer, beside
            the log-probability of the chosen one; None reports nothing.
        prompt_logprobs: the same for the prompt.
        grammar: what the answer must look like.
        repetition_detection: ends the answer when it repeats itself.
        include_stop_in_output: whether the answer keeps the text or token of `stop` or `stop_ids`
            that ended it.

    Raises:
        UserError: for a value of another type or out of range, or two that contradict each other.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    repetition_detection: RepetitionDetection | None = None
    include_stop_in_output: bool = False

    def __post_init__(self):
        check_fields(self)
        for name, kind in (("grammar", Grammar), ("repetition_detection", RepetitionDetection)):
            value = getattr(self, name)
            if not isinstance(value, kind | None):
                raise UserError(f"{name} {value!r:.80} is no {kind.__name__}; make one of it.")
        if self.grammar is not None:
            self._check_grammar()

    def _check_grammar(self) -> None:
        """Raises a UserError if another setting may forbid all tokens that the grammar allows."""
        for name, none in (("ignore_eos", False), ("min_tokens", 0), ("allowed_ids", None)):
            if getattr(self, name) != none:
                raise UserError(f"{name} may forbid all that the grammar allows; leave one out.")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises a UserError if a token is named that a model does not have."""
        biased = tuple(token for token, _ in self.logit_bias)
        named = {"stop_ids": self.stop_ids, "logit_bias": biased, "allowed_ids": self.allowed_ids}
        for name, ids in named.items():
            if ids and max(ids) >= vocab_size:
                raise UserError(
                    f"{name} holds token {max(ids)}; the vocabulary is 0 to {vocab_size - 1}."
                )


def sampling_of(checkpoint: str | Path, **wanted: Any) -> Sampling:
    """How a checkpoint's `generation_config.json` says to choose, else as `Sampling` does.

    Args:
        checkpoint: its folder.
        wanted: fields of `Sampling` that come before the checkpoint's; None leaves it the choice.

    Raises:
        UserError: if the file is broken, or a value out of range.
    """
    try:
        sampling = Sampling(**dict(read_generation_config(checkpoint).sampling))
    except UserError as error:
        raise UserError(f"{Path(checkpoint) / FILE}: {error}") from None
    given = {name: value for name, value in wanted.items() if value is not None}
    return dataclasses.replace(sampling, **given)


# What `sample` reads. The other fields are the host's, and those of a traced `Sampling` are the
# defaults, so that another text of `stop` compiles nothing again.
_ON_DEVICE = ("temperature", "top_p", "top_k", "seed")


def _flatten(sampling: Sampling) -> tuple[tuple, None]:
    return tuple(getattr(sampling, name) for name in _ON_DEVICE), None


def _unflatten(_: None, values: tuple) -> Sampling:
    """A `Sampling` of these values; traced values cannot pass the checks, so none are made."""
    sampling = object.__new__(Sampling)
    for name, value in zip(_ON_DEVICE, values, strict=True):
        object.__setattr__(sampling, name, value)
    return sampling


# Arguments of compiled programs: another seed or temperature compiles nothing again.
jax.tree_util.register_pytree_node(Sampling, _flatten, _unflatten)


def request_hash(request_id: object) -> np.uint32:
    """A stable number for a request's id."""
    return np.uint32(zlib.crc32(str(request_id).encode()))


def sample(
    sampling: Sampling,
    logits: Float[Array, "B V"],
    request: UInt[Array, "B"],
    index: Int[Array, "B"],
) -> Int[Array, "B"]:
    """The next token of each row; `NO_TOKEN` where a logit is NaN or infinity.

    Args:
        request: `request_hash` of the row's request.
        index: how many tokens the row has generated before.
    """
    seed = jax.random.key(sampling.seed)

    def choose(row, request, index):
        key = jax.random.fold_in(jax.random.fold_in(seed, request), index)
        return jax.random.categorical(key, row)

    def draw():
        scaled = (logits - logits.max(-1, keepdims=True)) / sampling.temperature
        return jax.vmap(choose)(keep_likely(sampling, scaled), request, index)

    greedy = sampling.temperature == 0
    token = jax.lax.cond(greedy, lambda: jnp.argmax(logits, axis=-1), draw)
    finite = jnp.isfinite(logits).all(axis=-1)  # XLA's maximum may drop a NaN
    return jnp.where(finite, token, NO_TOKEN).astype(jnp.int32)


def keep_likely(sampling: Sampling, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """-inf for the tokens that top-k and top-p leave out."""

    def leave_out():
        order = jnp.argsort(-logits, axis=-1)
        probability = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        kept = jnp.cumsum(probability, axis=-1) - probability <= sampling.top_p
        kept &= (jnp.arange(logits.shape[-1]) < sampling.top_k) | (sampling.top_k == 0)
        kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
        return jnp.where(kept, logits, -jnp.inf)

    keep_all = jnp.logical_and(sampling.top_p == 1, sampling.top_k == 0)
    return jax.lax.cond(keep_all, lambda: logits, leave_out)
