"""Jobs in JSON lines: one request a line in, one answer a line out."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from jaxmoe.errors import UserError
from jaxmoe.generate.engine import Request, Token
from jaxmoe.text import Tokenizer, render

KINDS = ("prompt", "messages", "tokens")


def read_requests(
    path: str | Path, tokenizer: Tokenizer | None, max_new_tokens: int
) -> list[Request]:
    """Requests of a file whose lines are `{"id": ..., "prompt" | "messages" | "tokens": ...}`.

    Raises:
        UserError: naming the file and line of the first that cannot be used.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # JSON may hold other breaks
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    requests: list[Request] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        request = _request(_record(line, where), tokenizer, max_new_tokens, where)
        first = seen.setdefault(str(request.id), number)
        if first != number:
            raise UserError(f"{where} has the id {request.id!r} of line {first}; ids must differ.")
        requests.append(request)
    if not requests:
        raise UserError(f"{path} holds no requests; write one JSON object a line.")
    return requests


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply.") from None
    if not isinstance(record, dict) or not _is_id(record.get("id")):
        raise UserError(f'{where} is not an object with an "id" that is text or an integer.')
    if sum(kind in record for kind in KINDS) != 1:
        raise UserError(f"{where} must hold exactly one of {', '.join(KINDS)}.")
    unknown = set(record) - {"id", *KINDS}
    if unknown:
        raise UserError(f"{where} has the unknown key '{min(unknown)}'.")
    return record


def _is_id(value: Any) -> bool:
    if isinstance(value, str):  # not half of a surrogate pair, which no file can hold
        return value.encode(errors="replace").decode() == value
    return type(value) is int


def _request(
    record: dict[str, Any], tokenizer: Tokenizer | None, max_new_tokens: int, where: str
) -> Request:
    if "tokens" in record:
        tokens = record["tokens"]
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise UserError(f'{where}: "tokens" must be a list of integers.')
    elif tokenizer is None:
        raise UserError(f"{where} has text, but the checkpoint has no tokenizer; use tokens.")
    else:
        tokens = _text_tokens(record, tokenizer, where)
    return Request(record["id"], tuple(tokens), max_new_tokens)


def _text_tokens(record: dict[str, Any], tokenizer: Tokenizer, where: str) -> list[int]:
    try:
        if "messages" in record:
            return render(record["messages"], tokenizer)
        if not isinstance(record["prompt"], str):
            raise UserError('"prompt" must be a string.')
        return tokenizer.encode(record["prompt"], bos=True)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def answer(
    request: Request, tokens: list[int], finish_reason: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The output record of a finished request; text is empty without a tokenizer."""
    text = tokenizer.decode(tokens) if tokenizer is not None else ""
    return {"id": request.id, "text": text, "tokens": tokens, "finish_reason": finish_reason}


def finished(
    stream: Iterator[Token], tokenizer: Tokenizer | None
) -> Iterator[tuple[Token, dict[str, Any] | None]]:
    """Each token, with its request's output record when it is the last."""
    written: dict[str, list[int]] = {}
    for token in stream:
        tokens = written.setdefault(str(token.request.id), [])
        tokens.append(token.token)
        record = None
        if token.finish_reason:
            record = answer(token.request, tokens, token.finish_reason, tokenizer)
        yield token, record


@contextlib.contextmanager
def output_file(path: str | Path) -> Iterator[TextIO]:
    """Writes `path` as `path.partial` and renames it when all is done.

    Raises:
        UserError: if `path` exists and is not empty, or cannot be written.
    """
    path = Path(path)
    if path.exists() and path.stat().st_size:
        raise UserError(f"{path} exists and is not empty; choose another output or delete it.")
    partial = path.with_name(path.name + ".partial")
    try:
        file = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None
    try:
        with file:
            yield file
        partial.rename(path)
    finally:
        if partial.exists() and not partial.stat().st_size:
            partial.unlink()  # nothing was answered
