"""Jobs in JSON lines: one request a line in, one answer a line out."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from jaxmoe.errors import UserError
from jaxmoe.generation.completion import CompletionToken, not_finite
from jaxmoe.generation.request import ERROR, Request, Token, expand
from jaxmoe.generation.request_keys import KEYS, Settings, read_settings
from jaxmoe.generation.sampling import Sampling
from jaxmoe.generation.side_by_side import outcomes
from jaxmoe.images import ImageSettings, PictureReader
from jaxmoe.parsing import MAX_TEXT_BYTES, decode_text, parse_json, read_text
from jaxmoe.text import (
    Prompt,
    Tokenizer,
    render_chat,
    split_places,
    text_prompt,
    token_prompt,
)

LINES = 256  # that are read at once, several in threads where there may be pictures
KINDS = ("prompt", "messages", "tokens")


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A line that cannot be a request, and why, in one sentence."""

    id: object
    error: str

    @property
    def record(self) -> dict[str, Any]:
        """The output record of the refused line."""
        return {"id": self.id, "error": self.error}


def read_requests(
    path: str | Path,
    tokenizer: Tokenizer | None,
    max_new_tokens: int,
    check: Callable[[Request], Request] = lambda request: request,
    parse_special: bool = False,
    default: Sampling | None = None,
    n: int = 1,
    images: ImageSettings | None = None,
    ignored: tuple[str, ...] = (),
) -> list[Request | Refusal]:
    """Requests of a file whose lines are `{"id": ..., "prompt" | "messages" | "tokens": ...}`.

    `tools` may stand beside `messages`, and beside each a list `images` and settings of the answer
    (`read_settings`). A line with `n` above 1 is as many requests. A bad line refuses itself and
    none of the others.

    Args:
        path: `-` is the standard input.
        max_new_tokens: of a line that does not say.
        check: makes of each request the one that runs, or raises a UserError.
        parse_special: whether a prompt may name special tokens; of messages none can.
        default: the settings that a line changes; default: `Sampling()`. A line without any becomes
            a request with `sampling` None.
        n: answers that a line asks for if it does not say.
        images: how pictures become tokens; None if the model has no vision tower. Relative paths
            begin at the file's folder.
        ignored: keys that a line may have and that say nothing of the request.

    Raises:
        UserError: if the file cannot be read, or has no line that is a request; it then names the
            first and why.
    """
    lines = _read(path).split("\n")  # JSON may hold other breaks
    pictures = None
    if images is not None:
        pictures = PictureReader(images, Path() if str(path) == "-" else Path(path).parent)
    default = default or Sampling()
    given = tokenizer, max_new_tokens, check, parse_special, default, n, pictures, ignored
    reader = RequestReader(*given)
    numbered = [(f"{path} line {i}", line) for i, line in enumerate(lines, start=1) if line.strip()]
    read: list[Request | Refusal] = []
    for batch in itertools.batched(numbered, LINES):
        read += itertools.chain.from_iterable(reader.read(batch))
    if not read:
        raise UserError(f"{path} holds no requests; write one JSON object a line.")
    refused = [line for line in read if isinstance(line, Refusal)]
    if len(refused) == len(read):
        others = f" All {len(numbered)} lines are refused." if len(numbered) > 1 else ""
        raise UserError(refused[0].error + others)
    return read


def _read(path: str | Path) -> str:
    if str(path) != "-":
        return read_text(path, MAX_TEXT_BYTES)
    return decode_text(sys.stdin.buffer.read(), "the standard input")


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line whose prompt is not read yet."""

    record: dict[str, Any]
    where: str
    settings: Settings


@dataclasses.dataclass
class RequestReader:
    """Reads lines, and knows the ids of those before.

    Attributes are arguments of `read_requests`, but for:
        pictures: reads the pictures of lines.
        seen: where each id was first, by its text.
    """

    tokenizer: Tokenizer | None
    max_new_tokens: int
    check: Callable[[Request], Request]
    parse_special: bool
    default: Sampling
    n: int = 1
    pictures: PictureReader | None = None
    ignored: tuple[str, ...] = ()
    seen: dict[str, str] = dataclasses.field(default_factory=dict)

    def read(
        self, lines: Iterable[tuple[str, str | dict[str, Any]]]
    ) -> list[Sequence[Request | Refusal]]:
        """The requests of each line, or why there are none.

        Args:
            lines: each with where it is, for error messages; text, or the object that it holds.
        """
        begun = [self._begin(*line) for line in lines]
        left = [line for line in begun if isinstance(line, _Line)]
        prompts = iter(outcomes(self._prompt_of, left, in_threads=self.pictures is not None))
        return [
            [line] if isinstance(line, Refusal) else self._end(line, next(prompts))
            for line in begun
        ]

    def _begin(self, where: str, line: str | dict[str, Any]) -> _Line | Refusal:
        """A line, whose ids are remembered."""
        found = None
        try:
            record = _record(line, where)
            found = record["id"]
            self._remember([found], where)
            _check_keys(record, where, self.ignored)
            settings = read_settings(record, self.default, where, self.n)
            answers = expand(Request(found, (), 1), settings.n)
            self._remember([answer.id for answer in answers], where)
            return _Line(record, where, settings)
        except UserError as error:
            return Refusal(found, str(error))

    def _end(self, line: _Line, prompt: Prompt | UserError) -> Sequence[Request | Refusal]:
        """The requests of a line, or why there are none."""
        try:
            request = self._request(line, prompt)
            return expand(_at(line.where, self.check, request), line.settings.n)
        except UserError as error:
            return [Refusal(line.record["id"], str(error))]

    def _remember(self, ids: list[Any], where: str) -> None:
        for id_ in ids:
            first = self.seen.setdefault(str(id_), where)
            if first != where:
                file = where.rsplit(" ", 2)[0]
                shown = first.removeprefix(f"{file} ")
                raise UserError(f"{where} has the id {id_!r} of {shown}; ids must differ.")

    def _request(self, line: _Line, prompt: Prompt | UserError) -> Request:
        if isinstance(prompt, UserError):
            raise prompt
        sampling = line.settings.sampling
        most = line.settings.max_new_tokens or self.max_new_tokens
        if sampling is not None and sampling.stop and self.tokenizer is None:
            raise UserError(f"{line.where} has stop strings, but the checkpoint has no tokenizer.")
        asked = line.record["id"], tuple(prompt.tokens), most, sampling, prompt.pictures
        return Request(*asked, line.settings.adapter)

    def _prompt_of(self, line: _Line) -> Prompt:
        return _at(line.where, self._prompt, line.record)

    def _prompt(self, record: dict[str, Any]) -> Prompt:
        given = record.get("images")
        images = () if given is None else given
        if "tokens" in record:
            tokens = record["tokens"]
            if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
                raise UserError('"tokens" must be a list of integers.')
            return token_prompt(tokens, self.tokenizer, self.pictures, images)
        if self.tokenizer is None:
            raise UserError("there is text, but the checkpoint has no tokenizer; use tokens.")
        if "messages" in record:
            messages, tools = record["messages"], record.get("tools")
            return render_chat(messages, self.tokenizer, self.pictures, tools, images=given)
        text = record["prompt"]
        if not isinstance(text, str):
            raise UserError('"prompt" must be a string.')
        texts = [text] if given is None else split_places(text)
        return text_prompt(texts, self.tokenizer, self.pictures, images, self.parse_special)


def _record(line: str | dict[str, Any], where: str) -> dict[str, Any]:
    record = parse_json(line, where) if isinstance(line, str) else line
    if not isinstance(record, dict) or not is_id(record.get("id")):
        raise UserError(f'{where} is not an object with an "id" that is text or an integer.')
    return record


def _check_keys(record: dict[str, Any], where: str, ignored: tuple[str, ...]) -> None:
    if sum(kind in record for kind in KINDS) != 1:
        raise UserError(f"{where} must hold exactly one of {', '.join(KINDS)}.")
    known = {"id", *KINDS, *KEYS, "images", *(("tools",) if "messages" in record else ()), *ignored}
    unknown = set(record) - known
    if unknown:
        raise UserError(f"{where} has the unknown key {min(unknown)!r}.")


def is_id(value: Any) -> TypeGuard[str | int]:
    """Whether a value can be a request's id: text or an integer."""
    if isinstance(value, str):  # not half of a surrogate pair, which no file can hold
        return value.encode(errors="replace").decode() == value
    return type(value) is int


def _at(where: str, function: Callable[[Any], Any], value: Any) -> Any:
    """`function(value)`; a UserError of it gets `where` in front."""
    try:
        return function(value)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def answer(
    request: Request, tokens: list[int], finish_reason: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The output record of a finished request; text is empty without a tokenizer."""
    text = tokenizer.decode(tokens) if tokenizer is not None else ""
    record = {"id": request.id, "text": text, "tokens": tokens, "finish_reason": finish_reason}
    if finish_reason == ERROR:
        record["error"] = not_finite(request, len(tokens))
    return record


def finished[T: Token](
    stream: Iterable[T], tokenizer: Tokenizer | None
) -> Iterator[tuple[T, dict[str, Any] | None]]:
    """Each token, with its request's output record when it is the last."""
    written: dict[str, list[int]] = {}
    for token in stream:
        if isinstance(token, CompletionToken):
            yield token, token.completion.record() if token.finish_reason else None
            continue
        tokens = written.setdefault(str(token.request.id), [])
        if token.finish_reason != ERROR:
            tokens.append(token.token)
        record = None
        if token.finish_reason:
            del written[str(token.request.id)]
            record = answer(token.request, tokens, token.finish_reason, tokenizer)
        yield token, record
