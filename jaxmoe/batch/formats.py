"""Lines of batch jobs: from a row to requests, and from their answers to a line of output.

A row is told apart by its keys: a line of OpenAI's Batch API, or one of ours. docs/batch.md lists
what each may hold.
"""

import dataclasses
import difflib
from collections.abc import Iterator

from jaxmoe.batch.envelope import CHAT, OURS, Asked, Envelope, Json
from jaxmoe.batch.openai_answers import answer_line, failed_line
from jaxmoe.batch.openai_requests import is_openai, kind_of, records_of
from jaxmoe.batch.parts import encode_part
from jaxmoe.errors import UserError
from jaxmoe.generation.jobs import KINDS, is_id
from jaxmoe.generation.request_keys import KEYS
from jaxmoe.parsing import MAX_BYTES, decode_text, parse_json

__all__ = [
    "Asked",
    "Envelope",
    "UnknownColumns",
    "encode_part",
    "error_line",
    "error_of",
    "is_failed",
    "output_line",
    "request_of",
]

_OWN = ("id", *KINDS, "images", *KEYS)
_SETTINGS = (*_OWN, "tools")
_ANSWER = (  # keys of an answer, which no copied column may hide
    *("id", "text", "tokens", "finish_reason", "stop_reason", "logprobs", "prompt_logprobs"),
    *("usage", "error", "warning", "answers"),
)


def request_of(content: bytes, where: str, number: int) -> Asked:
    """The requests of a row; a row that cannot be any is refused, and nothing is raised.

    Args:
        content: the row as JSON.
        where: its file and line, for error messages.
        number: of the row in the job, from 1; a row without an id is called "row-7" after it.
    """
    envelope = Envelope(CHAT if b'"custom_id"' in content else OURS, f"row-{number}")
    try:
        row = _parsed(content, where)
        envelope = _envelope(row, envelope)
        return (_read_openai if is_openai(row) else _read_own)(row, envelope)
    except UserError as error:
        said = str(error)
        return Asked(envelope, refusal=said if said.startswith(where) else f"{where}: {said}")


def output_line(envelope: Envelope, records: list[dict[str, Json]]) -> dict[str, Json]:
    """The line of output of a row; if one of its answers failed, `is_failed` is true of the line.

    Args:
        envelope: the row's.
        records: of its answers, as `jaxmoe.generation.jobs.finished` yields them: all of the first
            prompt, then all of the next.
    """
    errors = [record["error"] for record in records if "error" in record]
    if envelope.kind != OURS:
        return failed_line(envelope, errors[0], 500) if errors else answer_line(envelope, records)
    if len(records) == 1:
        return records[0] | {"id": envelope.id} | _copied(envelope)
    line = {"id": envelope.id, "answers": records} | _copied(envelope)
    return line | {"error": errors[0]} if errors else line


def error_line(envelope: Envelope, sentence: str) -> dict[str, Json]:
    """The line of output of a row that has no answer.

    Args:
        envelope: the row's.
        sentence: why.
    """
    if envelope.kind == OURS:
        return {"id": envelope.id, "error": sentence} | _copied(envelope)
    return failed_line(envelope, sentence, 400)


def is_failed(line: dict[str, Json]) -> bool:
    """Whether a line of output has an error in place of an answer, or beside it."""
    if line.get("error") is not None:
        return True
    response = line.get("response") if "custom_id" in line else None
    return isinstance(response, dict) and response["status_code"] != 200


def error_of(line: dict[str, Json]) -> str:
    """Why a row failed, by its line of output of which `is_failed` is true."""
    error = line["error"] or line["response"]["body"]["error"]
    return error if isinstance(error, str) else error["message"]


class UnknownColumns:
    """Finds columns that look like misspelt settings; tells of each once."""

    def __init__(self):
        self._seen: set[str] = set()

    def warnings(self, envelope: Envelope) -> Iterator[str]:
        """A sentence for each column of a row that is nearly a setting, and was not told of."""
        new = envelope.copied.keys() - self._seen
        self._seen |= new
        for key in sorted(new):
            if near := difflib.get_close_matches(key, _SETTINGS, n=1, cutoff=0.8):
                yield (
                    f"The column {key!r:.80} is copied to the output and changes no answer; "
                    f"the setting is called {near[0]!r}."
                )


def _parsed(content: bytes, where: str) -> dict[str, Json]:
    if len(content) > MAX_BYTES:
        raise UserError(f"{where} has more than {MAX_BYTES} bytes; make it shorter.")
    row = parse_json(decode_text(content, where), where)
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object.")
    return row


def _envelope(row: dict[str, Json], default: Envelope) -> Envelope:
    """The envelope of a row, with its id where that can be one, else with the default's."""
    openai = is_openai(row)
    given = row.get("custom_id" if openai else "id")
    copied = {} if openai else {key: row[key] for key in row if key not in _own_keys(row)}
    found = Envelope(CHAT if openai else OURS, default.id, copied=copied)
    return dataclasses.replace(found, id=given) if is_id(given) else found


def _read_openai(row: dict[str, Json], envelope: Envelope) -> Asked:
    if not isinstance(row.get("custom_id"), str) or row["custom_id"] != envelope.id:
        raise UserError('it has no "custom_id" that is text.')
    kind = kind_of(row)
    records = records_of(row, kind)
    model = row["body"].get("model")
    named = model if isinstance(model, str) else ""
    found = dataclasses.replace(envelope, kind=kind, model=named, prompts=len(records))
    return Asked(found, tuple(_named(records, row["custom_id"])))


def _named(records: list[dict[str, Json]], id_: str) -> Iterator[dict[str, Json]]:
    """Records with ids: that of the row, and of several "x[0]", "x[1]", ..."""
    for i, record in enumerate(records):
        yield {"id": id_ if len(records) == 1 else f"{id_}[{i}]"} | record


def _read_own(row: dict[str, Json], envelope: Envelope) -> Asked:
    if row.get("id") is not None and row["id"] != envelope.id:
        raise UserError('it has an "id" that is neither text nor an integer.')
    record = {key: row[key] for key in _own_keys(row) if row.get(key) is not None}
    if _has_chat(row):
        record["messages"] = record.pop("prompt")
    if sum(kind in record for kind in KINDS) != 1:
        raise UserError(f"it must hold exactly one of {', '.join(KINDS)}.")
    return Asked(envelope, (record | {"id": envelope.id},))


def _own_keys(row: dict[str, Json]) -> tuple[str, ...]:
    """The keys of a row of ours that say something of the request."""
    return _SETTINGS if row.get("messages") is not None or _has_chat(row) else _OWN


def _has_chat(row: dict[str, Json]) -> bool:
    """Whether `prompt` is a list of messages, as in data sets of conversations."""
    prompt = row.get("prompt")
    chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
    return chat and row.get("messages") is None


def _copied(envelope: Envelope) -> dict[str, Json]:
    """The copied columns; one that is called as a key of answers is "input_" and that."""
    renamed: dict[str, Json] = {}
    for key, value in envelope.copied.items():
        name = key
        while name in _ANSWER or name in renamed or (name != key and name in envelope.copied):
            name = f"input_{name}"
        renamed[name] = value
    return renamed
