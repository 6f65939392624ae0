"""From the values that `jaxmoe.LLM` is called with to requests."""

import dataclasses
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.generation.jobs import Refusal
from jaxmoe.generation.request import Request, expand
from jaxmoe.generation.request_keys import (
    MOST_SAMPLES,
    check_adapter_name,
    check_count,
    check_samples,
)
from jaxmoe.generation.results import check_some
from jaxmoe.generation.sampling import Sampling
from jaxmoe.generation.side_by_side import outcomes
from jaxmoe.images import PictureReader
from jaxmoe.text import (
    Prompt,
    Tokenizer,
    render_chat,
    split_places,
    text_prompt,
    token_prompt,
)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is asked for: settings for all prompts or one for each, lengths, and answers to each.

    Attributes:
        adapter: the name of one for all prompts, or a list of one or None for each.
    """

    sampling: Any
    max_new_tokens: Any
    n: Any
    adapter: Any = None


def read_prompts(
    prompts: list[Any],
    prompt_of: Callable[[Any], Prompt],
    wanted: Wanted,
    default: Sampling,
    check: Callable[[Request], Request],
    in_threads: bool = False,
) -> list[Request | Refusal]:
    """The requests for all answers, `wanted.n` to each prompt; a bad prompt refuses itself only.

    Args:
        prompt_of: makes tokens of a prompt, or raises a UserError.
        default: the settings where none are given.
        check: makes of each request the one that runs, or raises a UserError.
        in_threads: whether several prompts are read at once, which helps where they have pictures.

    Raises:
        UserError: if what is wanted cannot be, or all prompts are refused; it then says why the
            first is.
    """
    check_count("max_new_tokens", wanted.max_new_tokens)
    check_count("n", wanted.n, MOST_SAMPLES)
    samplings = _samplings(wanted.sampling, len(prompts), default)
    adapters = _adapters(wanted.adapter, len(prompts))
    lines: list[Request | Refusal] = []
    read = outcomes(prompt_of, prompts, in_threads)
    for i, (prompt, sampling, adapter) in enumerate(zip(read, samplings, adapters, strict=True)):
        request = Request(str(i), (), wanted.max_new_tokens, sampling, adapter=adapter)
        answers: list[Request] = expand(request, wanted.n)
        try:
            check_samples(wanted.n, sampling)
            if isinstance(prompt, UserError):
                raise prompt
            tokens, pictures = tuple(prompt.tokens), prompt.pictures
            whole = check(dataclasses.replace(request, tokens=tokens, pictures=pictures))
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


def _adapters(given: Any, count: int) -> list[str | None]:
    """The name of each prompt's adapter."""
    each = given if isinstance(given, list | tuple) else [given] * count
    if len(each) != count:
        raise UserError(
            f"there are {len(each)} adapters for {count} prompts; give one for all, or one for "
            "each."
        )
    return list(map(check_adapter_name, each))


def as_prompts(given: Any) -> list[Any]:
    """One prompt, as text, as tokens or as a mapping with pictures, or several, as a list."""
    given = _without_arrays(given)
    is_one = isinstance(given, str | Mapping) or (_is_tokens(given) and len(given) > 0)
    return [given] if is_one else _list(given, "prompts, or one prompt")


def as_conversations(given: Any) -> list[Any]:
    """One conversation, a list of messages, or several, as a list."""
    conversations = _list(given, "messages, or of several such lists")
    is_one = all(isinstance(message, Mapping) for message in conversations)
    return [conversations] if is_one else conversations


def read_prompt(
    prompt: Any, tokenizer: Tokenizer | None, reader: PictureReader | None = None
) -> Prompt:
    """A prompt of text or of tokens, or `{"prompt": either, "images": [...]}`.

    Text begins with the begin-of-text token, tokens stay as they are. With `images` each `<image>`
    or `<|image|>` is a place for one of them.

    Args:
        prompt: the prompt.
        tokenizer: of the model; None if it has none.
        reader: opens pictures; None if the model has no vision tower.

    Raises:
        UserError: if it is none of these, or text without a tokenizer, or a picture cannot be used.
    """
    images: Any = None
    if isinstance(prompt, Mapping):
        if not {"prompt"} <= set(prompt) <= {"prompt", "images"}:
            raise UserError(f"prompt {prompt!r:.80} has other keys than prompt and images.")
        prompt, images = prompt["prompt"], prompt.get("images")
    prompt = _without_arrays(prompt)
    if isinstance(prompt, str):
        texts = [prompt] if images is None else split_places(prompt)
        return text_prompt(texts, _needed(tokenizer), reader, () if images is None else images)
    if not _is_tokens(prompt):
        raise UserError(f"prompt {prompt!r:.80} is neither text nor a list of tokens.")
    tokens = [int(token) for token in prompt]
    return token_prompt(tokens, tokenizer, reader, () if images is None else images)


def read_conversation(
    messages: Any,
    tokenizer: Tokenizer | None,
    tools: Any,
    reader: PictureReader | None = None,
) -> Prompt:
    """A conversation up to the assistant's next turn."""
    return render_chat(messages, _needed(tokenizer), reader, tools)


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
