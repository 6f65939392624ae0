"""What `jaxmoe.LLM` returns: whole answers, pieces of them as they come, and scores of texts."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.generation.completion import Completion, CompletionToken
from jaxmoe.generation.jobs import Refusal
from jaxmoe.generation.logprobs import Logprob
from jaxmoe.generation.request import ERROR
from jaxmoe.generation.sampling import NO_TOKEN


@dataclasses.dataclass(frozen=True)
class Result:
    """The answer to a prompt, or why there is none.

    Attributes:
        id: the prompt's number as text, "3"; with `n` above 1 and the answer's number, "3#0". The
            random numbers depend on it.
        text: without special tokens; empty without a tokenizer.
        tokens: those of the answer. A token that ended it by `stop` or `stop_ids` is cut off.
        finish_reason: `stop`, `length`, `repetition`, or `error`.
        stop_reason: the stop string or the token of `stop_ids` that ended the answer, or
            `repetition_detected`; None if the model's own stop token or the length did.
        logprobs: one for each of `tokens`, if the sampling asks for them.
        prompt_tokens: the prompt as the model had it.
        prompt_logprobs: one for each of `prompt_tokens`, of which the first is None, if the
            sampling asks for them.
        usage: `prompt_tokens` and `completion_tokens`; those that were cut off count.
        drafted, accepted: how many drafts its steps have tried, first, second, ... after the last
            token, and how many of these were right. Its tokens took as many steps fewer.
        error: why the prompt was refused, or the answer ended with an error; None if all is well.
        warning: that the answer ended before its grammar allowed it; None if all is well.
        record: all this as a line of output of `jaxmoe generate`, which JSON can hold.
    """

    id: str
    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: tuple[Logprob, ...] | None
    prompt_tokens: tuple[int, ...]
    prompt_logprobs: tuple[Logprob | None, ...] | None
    usage: dict[str, int]
    error: str | None
    warning: str | None
    record: dict[str, Any] = dataclasses.field(repr=False, compare=False)
    drafted: tuple[int, ...] = dataclasses.field(default=(), compare=False)
    accepted: tuple[int, ...] = dataclasses.field(default=(), compare=False)


def finished_result(completion: Completion) -> Result:
    """The result of a finished answer."""
    record, logprobs = completion.record(), completion.logprobs
    prompt = completion.prompt_logprobs
    return Result(
        id=record["id"],
        text=record["text"],
        tokens=tuple(record["tokens"]),
        finish_reason=record["finish_reason"],
        stop_reason=record.get("stop_reason"),
        logprobs=None if logprobs is None else tuple(logprobs),
        prompt_tokens=completion.request.tokens,
        prompt_logprobs=None if prompt is None else (None, *prompt),
        usage=record["usage"],
        error=record.get("error"),
        warning=record.get("warning"),
        record=record,
        drafted=tuple(completion.drafted),
        accepted=tuple(completion.accepted),
    )


def refused_result(refusal: Refusal) -> Result:
    """The result of a prompt that was not run."""
    return Result(
        id=str(refusal.id),
        text="",
        tokens=(),
        finish_reason=ERROR,
        stop_reason=None,
        logprobs=None,
        prompt_tokens=(),
        prompt_logprobs=None,
        usage={"prompt_tokens": 0, "completion_tokens": 0},
        error=refusal.error,
        warning=None,
        record=refusal.record,
    )


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is new of an answer.

    Attributes:
        index: the answer's place among the results.
        text: new text, which is never taken back; empty while what may become a stop string, or
            half a character, is held back.
        tokens: new tokens; those that a stop string cuts off are among them.
        finish_reason: why the answer has ended; None if it goes on.
        result: the whole answer, once it has ended.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    result: Result | None


def piece_of(index: int, token: CompletionToken) -> Piece:
    """The piece of the answer with this index that a token of the engine is."""
    tokens = () if token.token == NO_TOKEN else (token.token,)
    result = finished_result(token.completion) if token.finish_reason else None
    return Piece(index, token.text, tokens, token.finish_reason, result)


def refused_piece(index: int, refusal: Refusal) -> Piece:
    """The only piece of an answer that there is not."""
    return Piece(index, "", (), ERROR, refused_result(refusal))


def results_of(pieces: Iterable[Piece]) -> list[Result]:
    """The results in the order of the prompts."""
    found = {piece.index: piece.result for piece in pieces if piece.result is not None}
    return [found[index] for index in sorted(found)]


@dataclasses.dataclass(frozen=True)
class Score:
    """How well the model predicts a text.

    Attributes:
        tokens: the text's, the begin-of-text token included.
        logprobs: one for each of `tokens`, of which the first is None: nothing predicts it.
        total: the sum of the log-probabilities, in nats.
        mean: their mean; `math.exp(-mean)` is the perplexity.
        error: why there is no score; None if all is well.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[Logprob | None, ...]
    total: float
    mean: float
    error: str | None


def score_of(result: Result) -> Score:
    """The score of a prompt whose log-probabilities were asked for."""
    values = [one.logprob for one in result.prompt_logprobs or () if one is not None]
    if result.error is not None or not values:
        error = result.error or f"text {result.id} is a single token, which nothing predicts."
        return Score(result.prompt_tokens, (), float("nan"), float("nan"), error)
    total = sum(values)
    return Score(
        result.prompt_tokens, result.prompt_logprobs or (), total, total / len(values), None
    )


def check_some(results: Sequence[Result | Score | Refusal]) -> None:
    """Raises a UserError with the first error if all results have one."""
    errors = [result.error for result in results if result.error is not None]
    if errors and len(errors) == len(results):
        others = f" All {len(errors)} have failed." if len(errors) > 1 else ""
        raise UserError(errors[0] + others)
