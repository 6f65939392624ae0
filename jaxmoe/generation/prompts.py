"""From the values that `jaxmoe.LLM` is called with to requests."""

import dataclasses
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.generation.jobs import Refusal
from jaxmoe.generation.request import Request, expand
from jaxmoe.generation.request_keys import MOST_SAMPLES, check_count, check_samples
from jaxmoe.generation.results import check_some
from jaxmoe.generation.sampling import Sampling
from jaxmoe.text import Tokenizer, render


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is asked for: settings for all prompts or one for each, lengths, and answers to each."""

    sampling: Any
    max_new_tokens: Any
    n: Any


def read_prompts(
    prompts: list[Any],
    tokens_of: Callable[[Any], list[int]],
    wanted: Wanted,
    default: Sampling,
    check: Callable[[Request], Request],
) -> list[Request | Refusal]:
    """The requests for all answers, `wanted.n` to each prompt; a bad prompt refuses itself only.

    Args:
        tokens_of: makes tokens of a prompt, or raises a UserError.
        default: the settings where none are given.
        check: makes of each request the one that runs, or raises a UserError.

    Raises:
        UserError: if what is wanted cannot be, or all prompts are refused; it then says why the
            first is.
    """
    check_count("max_new_tokens", wanted.max_new_tokens)
    check_count("n", wanted.n, MOST_SAMPLES)
    samplings = _samplings(wanted.sampling, len(prompts), default)
    lines: list[Request | Refusal] = []
    for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        request = Request(str(i), (), wanted.max_new_tokens, sampling)
        answers: list[Request] = expand(request, wanted.n)
        try:
            check_samples(wanted.n, sampling)
            whole = check(dataclasses.replace(request, tokens=tuple(tokens_of(prompt))))
            lines += [dataclasses.replace(whole, id=answer.id) for answer in answers]
        except UserError as error:
            lines += [Refusal(answer.id, str(error)) for answer in answers]
    refused = [line for line in lines if isinstance(line, Refusal)]
    if len(refused) == len(lines):
        check_some(refused)
    return lines


def _samplings(given: Any, count: int, default: Sampling) -> list[Sampling]:
    """The settings of each prompt."""
    is_one = given is None or isinstance(given, Sampling)
    each = [given] * count if is_one else _list(given, "settings, or one jaxmoe.Sampling")
    if len(each) != count:
        raise UserError(
            f"there are {len(each)} settings of sampling for {count} prompts; give one for all, or "
            "one for each."
        )
    for sampling in each:
        if not isinstance(sampling, Sampling | None):
            raise UserError(f"sampling {sampling!r:.80} is no jaxmoe.Sampling; make one of it.")
    return [sampling or default for sampling in each]


def as_prompts(given: Any) -> list[Any]:
    """One prompt, as text or as tokens, or several, as a list."""
    given = _without_arrays(given)
    is_one = isinstance(given, str) or (_is_tokens(given) and len(given) > 0)
    return [given] if is_one else _list(given, "prompts, or one prompt")


def as_conversations(given: Any) -> list[Any]:
    """One conversation, a list of messages, or several, as a list."""
    conversations = _list(given, "messages, or of several such lists")
    is_one = all(isinstance(message, Mapping) for message in conversations)
    return [conversations] if is_one else conversations


def prompt_tokens(prompt: Any, tokenizer: Tokenizer | None) -> list[int]:
    """The tokens of a prompt; text begins with the begin-of-text token, tokens stay as they are.

    Raises:
        UserError: if it is neither, or text without a tokenizer.
    """
    prompt = _without_arrays(prompt)
    if isinstance(prompt, str):
        return _needed(tokenizer).encode(prompt, bos=True)
    if not _is_tokens(prompt):
        raise UserError(f"prompt {prompt!r:.80} is neither text nor a list of tokens.")
    return [int(token) for token in prompt]


def conversation_tokens(messages: Any, tokenizer: Tokenizer | None, tools: Any) -> list[int]:
    """The tokens of a conversation up to the assistant's next turn."""
    return render(messages, _needed(tokenizer), tools)


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise UserError("the checkpoint has no tokenizer; give the prompt as a list of tokens.")
    return tokenizer


def _without_arrays(value: Any) -> Any:
    """Lists of Python's in place of arrays."""
    return np.asarray(value).tolist() if hasattr(value, "__array__") else value


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_token, value))


def _is_token(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _list(value: Any, what: str) -> list[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise UserError(f"{value!r:.80} cannot be used; give a list of {what}.")
    return list(value)
