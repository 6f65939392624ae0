"""What a row of a batch job asks for, and what its line of output needs to know of it."""

import dataclasses
from typing import Any

type Json = Any  # a value from a JSON file

CHAT, COMPLETION, OURS = "chat.completion", "text_completion", "jaxmoe"


@dataclasses.dataclass(frozen=True)
class Envelope:
    """What of a row belongs to its line of output, and not to its requests.

    Attributes:
        kind: `CHAT` and `COMPLETION`, which are OpenAI's, or `OURS`, that of docs/requests.md.
        id: the row's `id` or `custom_id`; "row-7" of the seventh of a job if it has none.
        model: what a row of OpenAI's calls the model.
        prompts: how many prompts the row has: one of OpenAI's completions may have several.
        copied: columns that say nothing of the request.
    """

    kind: str
    id: str | int
    model: str = ""
    prompts: int = 1
    copied: dict[str, Json] = dataclasses.field(default_factory=dict)


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
