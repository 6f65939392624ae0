"""Answers and errors as lines of OpenAI's Batch API, and in the shape of its completions."""

import codecs
import hashlib
from typing import Any

from jaxmoe.batch.envelope import CHAT, Envelope, Json

_REASONS = {"repetition": "stop"}  # what OpenAI has no word for
_PREFIXES = {CHAT: "chatcmpl"}
CREATED = 0  # so that a row has the same bytes in every run
_BESIDE = ("stop_reason", "prompt_logprobs", "warning")  # of a choice: vLLM's, and ours


def answer_line(envelope: Envelope, records: list[dict[str, Json]]) -> dict[str, Json]:
    """The line of a row's answers, all of the first prompt, then all of the next."""
    choose = _chat_choice if envelope.kind == CHAT else _text_choice
    body: dict[str, Json] = {
        "id": f"{_PREFIXES.get(envelope.kind, 'cmpl')}-{_digest(envelope)}",
        "object": envelope.kind,
        "created": CREATED,
        "model": envelope.model,
        "choices": [choose(index, record) for index, record in enumerate(records)],
    }
    if all("usage" in record for record in records):
        body["usage"] = _usage(envelope.prompts, [record["usage"] for record in records])
    return _line(envelope, 200, body)


def failed_line(envelope: Envelope, sentence: str, status: int) -> dict[str, Json]:
    """The line of a row at which something went wrong.

    Args:
        envelope: the row's.
        sentence: what.
        status: 400 if the request is at fault, 500 if it is not.
    """
    kind = "invalid_request_error" if status == 400 else "server_error"
    error = {"message": sentence, "type": kind, "param": None, "code": None}
    return _line(envelope, status, {"error": error})


def _line(envelope: Envelope, status: int, body: Json) -> dict[str, Json]:
    name = _digest(envelope)
    response = {"status_code": status, "request_id": f"req_{name}", "body": body}
    return {
        "id": f"batch_req_{name}",
        "custom_id": str(envelope.id),
        "response": response,
        "error": None,
    }


def _digest(envelope: Envelope) -> str:
    """What names the row in ids: the same in each run of a job."""
    return hashlib.sha256(str(envelope.id).encode()).hexdigest()[:24]


def _chat_choice(index: int, record: dict[str, Json]) -> dict[str, Json]:
    message = {"role": "assistant", "content": record["text"], "refusal": None}
    logprobs = record.get("logprobs")
    shaped = logprobs and {"content": logprobs["content"], "refusal": None}
    return {"index": index, "message": message} | _end(record, shaped)


def _text_choice(index: int, record: dict[str, Json]) -> dict[str, Json]:
    logprobs = record.get("logprobs")
    shaped = logprobs and _text_logprobs(logprobs["content"])
    return {"index": index, "text": record["text"]} | _end(record, shaped)


def _end(record: dict[str, Json], logprobs: Json) -> dict[str, Json]:
    """What a choice of a chat and one of a completion have in common."""
    reason = record["finish_reason"]
    beside = {key: record[key] for key in _BESIDE if key in record}
    return {"logprobs": logprobs, "finish_reason": _REASONS.get(reason, reason)} | beside


def _text_logprobs(entries: list[dict[str, Any]]) -> dict[str, Json]:
    """Log-probabilities in the shape of completions; the chosen token is among the likeliest."""
    offsets, length, decoder = [], 0, codecs.getincrementaldecoder("utf-8")("ignore")
    for entry in entries:
        offsets.append(length)
        length += len(decoder.decode(bytes(entry["bytes"] or ())))
    chosen = [{entry["token"]: entry["logprob"]} for entry in entries]
    others = [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries]
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [other | one for other, one in zip(others, chosen, strict=True)],
        "text_offset": offsets,
    }


def _usage(prompts: int, usages: list[dict[str, int]]) -> dict[str, int]:
    """The tokens of all answers; a prompt with several counts once."""
    read = sum(usage["prompt_tokens"] for usage in usages[:: len(usages) // prompts])
    written = sum(usage["completion_tokens"] for usage in usages)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
    }
