"""Lines of batch jobs: from a row to requests, and from their answers to a line of output.

A row is told apart by its keys: a line of OpenAI's Batch API, or one of ours. docs/batch.md lists
what each may hold.
"""

import dataclasses
from typing import Any, Literal

type Json = Any  # a value from a JSON file

CHAT, COMPLETION, OURS = "chat.completion", "text_completion", "jaxmoe"


@dataclasses.dataclass(frozen=True)
class Envelope:
    """What of a row belongs to its line of output, and not to its requests.

    Attributes:
        kind: `CHAT` and `COMPLETION` are OpenAI's, `OURS` is the form of docs/requests.md.
        id: the row's `id` or `custom_id`; None if it has none that can be used.
        model: what a row of OpenAI's calls the model.
        prompts: how many prompts the row has: OpenAI's completions may have a list.
        copied: columns that say nothing of the request.
        created: the time of OpenAI's answers, in seconds since 1970.
    """

    kind: Literal["chat.completion", "text_completion", "jaxmoe"]
    id: str | int | None
    model: str = ""
    prompts: int = 1
    copied: dict[str, Json] = dataclasses.field(default_factory=dict)
    created: int = 0


@dataclasses.dataclass(frozen=True)
class Asked:
    """A row as requests.

    Attributes:
        envelope: for its line of output.
        records: one for each prompt, nearly always one, as `jaxmoe.generation.jobs.read_requests`
            reads them; none if the row is refused.
        refusal: why the row is refused, in one sentence; None if it is not.
    """

    envelope: Envelope
    records: tuple[dict[str, Json], ...] = ()
    refusal: str | None = None


def request_of(content: bytes, where: str, number: int) -> Asked:
    """The requests of a row; never raises.

    Args:
        content: the row as JSON.
        where: its file and line, for error messages.
        number: of the row in the job, from 1; a row without an id is called "row-7" after it.
    """
    raise NotImplementedError


def output_line(envelope: Envelope, records: list[dict[str, Json]]) -> dict[str, Json]:
    """The line of output of a row.

    Args:
        envelope: the row's.
        records: of its answers, as `jaxmoe.generation.jobs.finished` yields them: all of the first
            prompt, then all of the next.
    """
    raise NotImplementedError


def error_line(envelope: Envelope, sentence: str, ran: bool) -> dict[str, Json]:
    """The line of output of a row that has no answer.

    Args:
        envelope: the row's.
        sentence: why.
        ran: False if the row was never looked at, as when a job ends early; True if it, or what the
            model made of it, is at fault.
    """
    raise NotImplementedError


def encode_part(lines: list[dict[str, Json]], form: Literal["jsonl", "parquet"]) -> bytes:
    """The content of a file of output."""
    raise NotImplementedError
