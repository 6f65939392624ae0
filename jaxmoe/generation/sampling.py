"""How the tokens of an answer are chosen: the settings of a request.

A token's random numbers come from the seed, its request's id and its index in the answer, so they
depend neither on the other rows of a batch nor on the mesh.
"""

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import numpy as np

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


def request_hash(request_id: object) -> np.uint32:
    """A stable number for a request's id."""
    return np.uint32(zlib.crc32(str(request_id).encode()))
