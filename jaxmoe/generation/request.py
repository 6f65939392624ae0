"""What is asked of a model, and the tokens that it answers with."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation.sampling import Sampling
from jaxmoe.images import Picture
from jaxmoe.model.adapters import adapter_number
from jaxmoe.text import Tokenizer

ERROR = "error"  # the reason why a request ended whose logits were not finite


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt as tokens, and how many more are wanted, at most.

    Attributes:
        tokens: of the prompt, with those of every picture at its place.
        sampling: how they are chosen; None is the run's default.
        pictures: in the order of the tokens.
        adapter: the name of one of the model's adapters; None for none of them.
    """

    id: object
    tokens: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling | None = None
    pictures: tuple[Picture, ...] = ()
    adapter: str | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the longest answer together."""
        return len(self.tokens) + self.max_new_tokens


class Token(NamedTuple):
    """One generated token.

    Attributes:
        token: `NO_TOKEN` if the logits were not finite.
        finish_reason: on a request's last token `stop`, `length`, `repetition`, or `ERROR` if the
            logits were not finite; else None.
    """

    request: Request
    token: int
    finish_reason: str | None


def expand(request: Request, n: int) -> list[Request]:
    """The requests for n answers to one prompt; those of several have the ids "x#0", "x#1", ...

    Random numbers depend on the id, so the answers differ, and each can be had again alone.
    """
    if n == 1:
        return [request]
    return [dataclasses.replace(request, id=f"{request.id}#{i}") for i in range(n)]


def without_begin(request: Request, begin: int) -> Request:
    """The request without its begin-of-text token `begin`: a document before it has one."""
    if request.tokens[:1] != (begin,):
        return request
    return dataclasses.replace(request, tokens=request.tokens[1:])


def given_sampling(request: Request) -> Sampling:
    """The settings of a request that has been given some: in an engine each has its own."""
    assert request.sampling is not None
    return request.sampling


def stop_ids_of(config: Llama4Config, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The tokens that end an answer, by the model's config or by its tokenizer."""
    return tuple(sorted({*config.eos_token_ids, *(tokenizer.stop_ids if tokenizer else ())}))


def check_room(request: Request, room: int, where: str = "the cache") -> None:
    """Raises a UserError if a request takes more tokens than there is room for."""
    if request.length > room:
        raise UserError(
            f"request {request.id!r} takes {request.length} tokens, and {where} has room for "
            f"{room}; give it more, or ask for fewer new tokens."
        )


def check_adapter(request: Request, names: Sequence[str]) -> None:
    """Raises a UserError unless the request's adapter is None or one of the names."""
    try:
        adapter_number(names, request.adapter)
    except UserError as error:
        raise UserError(f"request {request.id!r}: {error}") from None


def other_adapter(request: Request) -> UserError:
    """The error for a request after a document that was read with another adapter."""
    own = "no adapter" if request.adapter is None else f"the adapter {request.adapter!r:.80}"
    return UserError(
        f"request {request.id!r} has {own}, and the document was read with another; ask with the "
        "one that it was read with, or read the text with this one."
    )


def fit_context(config: Llama4Config, request: Request, after: int = 0) -> Request:
    """The request with `max_new_tokens` cut to the model's context.

    Args:
        after: tokens of a document that it comes after.

    Raises:
        UserError: if it has no tokens, no room, or tokens that are not in the vocabulary, or its
            `min_tokens` are more than it asks for, or its tokens are not those of its pictures.
    """
    room = config.max_position_embeddings - after - len(request.tokens)
    if not request.tokens:
        raise UserError(f"request {request.id!r} has no tokens; give it a prompt.")
    if request.max_new_tokens < 1:
        raise UserError(f"request {request.id!r} asks for {request.max_new_tokens} new tokens.")
    if room < 1:
        raise UserError(
            f"request {request.id!r} has a prompt of {after + len(request.tokens)} tokens, which "
            f"leaves no room in the model's context of {config.max_position_embeddings}; "
            f"shorten it{_or_pictures(request)}."
        )
    for token in (min(request.tokens), max(request.tokens)):
        if not 0 <= token < config.vocab_size:
            raise UserError(
                f"request {request.id!r} holds token {token}; the vocabulary is 0 to "
                f"{config.vocab_size - 1}."
            )
    _check_pictures(config, request)
    if request.sampling is not None:
        _check_sampling(config, request, request.sampling)
    return dataclasses.replace(request, max_new_tokens=min(room, request.max_new_tokens))


def _or_pictures(request: Request) -> str:
    """What else than the text can be shortened."""
    if not request.pictures:
        return ""
    count = sum(picture.num_features for picture in request.pictures)
    names = ", ".join(picture.name for picture in request.pictures)
    return f", or make the pictures smaller, which take {count} of them: {names:.200}"


def _check_pictures(config: Llama4Config, request: Request) -> None:
    if request.pictures and config.vision is None:
        raise UserError(
            f"request {request.id!r} has the picture {request.pictures[0].name}, and the "
            "checkpoint has no vision tower to see it."
        )
    for picture in request.pictures:
        if config.vision is not None and picture.settings.tile_size != config.vision.image_size:
            raise UserError(
                f"request {request.id!r} has the picture {picture.name} in tiles of "
                f"{picture.settings.tile_size} pixels, and the tower's have "
                f"{config.vision.image_size}; use `LLM.images` or `ImageSettings.of`."
            )
    found = request.tokens.count(config.image_token_id) if config.vision is not None else 0
    wanted = sum(picture.num_features for picture in request.pictures)
    if found != wanted:
        names = ", ".join(picture.name for picture in request.pictures) or "none"
        raise UserError(
            f"request {request.id!r} has {found} tokens {config.image_token_id} for the parts of "
            f"pictures, and its pictures ({names:.200}) have {wanted}; give the pictures and the "
            "tokens of each."
        )


def _check_sampling(config: Llama4Config, request: Request, sampling: Sampling) -> None:
    if sampling.min_tokens > request.max_new_tokens:
        raise UserError(
            f"request {request.id!r} asks for at least {sampling.min_tokens} new tokens and for at "
            f"most {request.max_new_tokens}; raise the one or lower the other."
        )
    try:
        sampling.check_vocabulary(config.vocab_size)
    except UserError as error:
        raise UserError(f"request {request.id!r}: {error}") from None
