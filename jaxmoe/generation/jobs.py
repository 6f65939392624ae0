"""Jobs in JSON lines: one request a line in, one answer a line out."""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.generation.engine import ERROR, Request, Token
from jaxmoe.parsing import MAX_TEXT_BYTES, parse_json, read_text
from jaxmoe.text import Tokenizer, render

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
) -> list[Request | Refusal]:
    """Requests of a file whose lines are `{"id": ..., "prompt" | "messages" | "tokens": ...}`.

    `tools` may stand beside `messages`. A bad line refuses itself and none of the others.

    Args:
        path: `-` is the standard input.
        check: makes of each request the one that runs, or raises a UserError.
        parse_special: whether a prompt may name special tokens; of messages none can.

    Raises:
        UserError: if the file cannot be read, or has no line that is a request; it then names the
            first and why.
    """
    lines = _read(path).split("\n")  # JSON may hold other breaks
    read: list[Request | Refusal] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path} line {number}"
            read.append(
                _read_line(
                    line, where, number, seen, tokenizer, max_new_tokens, parse_special, check
                )
            )
    if not read:
        raise UserError(f"{path} holds no requests; write one JSON object a line.")
    refused = [line for line in read if isinstance(line, Refusal)]
    if len(refused) == len(read):
        others = f" All {len(read)} lines are refused." if len(read) > 1 else ""
        raise UserError(refused[0].error + others)
    return read


def _read(path: str | Path) -> str:
    if str(path) != "-":
        return read_text(path, MAX_TEXT_BYTES)
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"the standard input is no UTF-8 at byte {error.start}.") from None


def _read_line(
    line: str,
    where: str,
    number: int,
    seen: dict[str, int],
    tokenizer: Tokenizer | None,
    max_new_tokens: int,
    parse_special: bool,
    check: Callable[[Request], Request],
) -> Request | Refusal:
    found = None
    try:
        record = _record(line, where)
        found = record["id"]
        first = seen.setdefault(str(found), number)
        if first != number:
            raise UserError(f"{where} has the id {found!r} of line {first}; ids must differ.")
        _check_keys(record, where)
        request = _request(record, tokenizer, max_new_tokens, parse_special, where)
        return _at(where, check, request)
    except UserError as error:
        return Refusal(found, str(error))


def _record(line: str, where: str) -> dict[str, Any]:
    record = parse_json(line, where)
    if not isinstance(record, dict) or not _is_id(record.get("id")):
        raise UserError(f'{where} is not an object with an "id" that is text or an integer.')
    return record


def _check_keys(record: dict[str, Any], where: str) -> None:
    if sum(kind in record for kind in KINDS) != 1:
        raise UserError(f"{where} must hold exactly one of {', '.join(KINDS)}.")
    unknown = set(record) - {"id", *KINDS, *(("tools",) if "messages" in record else ())}
    if unknown:
        raise UserError(f"{where} has the unknown key {min(unknown)!r}.")


def _is_id(value: Any) -> bool:
    if isinstance(value, str):  # not half of a surrogate pair, which no file can hold
        return value.encode(errors="replace").decode() == value
    return type(value) is int


def _request(
    record: dict[str, Any],
    tokenizer: Tokenizer | None,
    max_new_tokens: int,
    parse_special: bool,
    where: str,
) -> Request:
    if "tokens" in record:
        tokens = record["tokens"]
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise UserError(f'{where}: "tokens" must be a list of integers.')
    elif tokenizer is None:
        raise UserError(f"{where} has text, but the checkpoint has no tokenizer; use tokens.")
    else:
        tokens = _text_tokens(record, tokenizer, parse_special, where)
    return Request(record["id"], tuple(tokens), max_new_tokens)


def _text_tokens(
    record: dict[str, Any], tokenizer: Tokenizer, parse_special: bool, where: str
) -> list[int]:
    def tokens(record: dict[str, Any]) -> list[int]:
        if "messages" in record:
            return render(record["messages"], tokenizer, record.get("tools"))
        if not isinstance(record["prompt"], str):
            raise UserError('"prompt" must be a string.')
        return tokenizer.encode(record["prompt"], bos=True, parse_special=parse_special)

    return _at(where, tokens, record)


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


def not_finite(request: Request, count: int) -> str:
    """The error message of a request that ended with `ERROR`."""
    return (
        f"request {request.id!r}: the model's logits after {count} new tokens are not finite; "
        "look for NaN in its weights with jaxmoe convert --verify, or compute in float32."
    )


def finished(
    stream: Iterable[Token], tokenizer: Tokenizer | None
) -> Iterator[tuple[Token, dict[str, Any] | None]]:
    """Each token, with its request's output record when it is the last."""
    written: dict[str, list[int]] = {}
    for token in stream:
        tokens = written.setdefault(str(token.request.id), [])
        if token.finish_reason != ERROR:
            tokens.append(token.token)
        record = None
        if token.finish_reason:
            del written[str(token.request.id)]
            record = answer(token.request, tokens, token.finish_reason, tokenizer)
        yield token, record
