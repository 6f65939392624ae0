"""Lines of OpenAI's Batch API as requests: the keys of their bodies, and vLLM's beside them."""

from typing import Any

from jaxmoe.batch.envelope import CHAT, COMPLETION, Json
from jaxmoe.errors import UserError
from jaxmoe.generation.request_keys import KEYS

_ENDS = {"/chat/completions": CHAT, "/completions": COMPLETION}  # of URLs; the first one counts
_LINE = ("custom_id", "method", "url", "body")
_GUIDED = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}
_WITHOUT_EFFECT = (  # on the answer
    "model",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "stream_options",
    "request_id",
    "priority",
    "guided_decoding_backend",
)
_ONLY: dict[str, tuple[Any, ...]] = {  # the values of a key that change nothing
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "tool_choice": ("auto", "none"),
    "bad_words": ([],),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}
_ADDS_BEGIN = {CHAT: False, COMPLETION: True}  # add_special_tokens, where the template adds them


def is_openai(row: dict[str, Json]) -> bool:
    """Whether a row is a line of OpenAI's Batch API."""
    return sum(key in row for key in ("custom_id", "url", "body")) > 1


def kind_of(row: dict[str, Json]) -> str:
    """Which answers a line asks for, `CHAT` or `COMPLETION`.

    Raises:
        UserError: if it is for another endpoint.
    """
    url = row.get("url")
    for end, kind in _ENDS.items():
        if isinstance(url, str) and url.endswith(end):
            return kind
    raise UserError(
        f"the url {url!r:.80} is not served; use /v1/chat/completions or /v1/completions."
    )


def records_of(row: dict[str, Json], kind: str) -> list[dict[str, Json]]:
    """The requests of a line, without ids, one for each prompt.

    Args:
        row: the line.
        kind: of `kind_of`.

    Raises:
        UserError: that names the key, if the line or its body has one that would change the answer
            and that is not known.
    """
    _check_line(row)
    body = {key: value for key, value in row["body"].items() if value is not None}
    settings = {key: body[key] for key in KEYS if key in body} | _guided(body)
    rest = set(body) - set(settings) - set(_GUIDED) - set(_WITHOUT_EFFECT)
    prompts = _chat(body) if kind == CHAT else _prompts(body)
    for key in sorted(rest - {"messages", "tools"} if kind == CHAT else rest - {"prompt"}):
        _check_value(key, body[key], kind)
    return [prompt | settings for prompt in prompts]


def _check_line(row: dict[str, Json]) -> None:
    if row.get("method", "POST") != "POST":
        raise UserError(f"the method {row['method']!r:.80} is not POST; write POST.")
    if not isinstance(row.get("body"), dict):
        raise UserError('it has no "body" that is an object.')
    unknown = sorted(set(row) - set(_LINE))
    if unknown:
        raise UserError(f"it has the unknown key {unknown[0]!r:.80}; it has {', '.join(_LINE)}.")


def _check_value(key: str, value: Json, kind: str) -> None:
    """Raises a UserError unless a key of a body has a value that changes nothing."""
    allowed = (_ADDS_BEGIN[kind],) if key == "add_special_tokens" else _ONLY.get(key)
    if allowed is None:
        raise UserError(f"the body has the key {key!r:.80}, which is not known; leave it out.")
    if value not in allowed:
        values = " or ".join(repr(one) for one in allowed)
        raise UserError(f"the body's {key} is {value!r:.80}; only {values} is possible.")


def _guided(body: dict[str, Json]) -> dict[str, Json]:
    """`structured_outputs`, from the older names of vLLM."""
    given = {kind: body[key] for key, kind in _GUIDED.items() if key in body}
    if given and "structured_outputs" in body:
        raise UserError(f"guided_{min(given)} and structured_outputs are the same; use one.")
    return {"structured_outputs": given} if given else {}


def _chat(body: dict[str, Json]) -> list[dict[str, Json]]:
    if "messages" not in body:
        raise UserError('the body has no "messages".')
    tools = body.get("tools")
    if not tools or body.get("tool_choice") == "none":
        return [{"messages": body["messages"]}]
    return [{"messages": body["messages"], "tools": tools}]


def _prompts(body: dict[str, Json]) -> list[dict[str, Json]]:
    """A request for a text, a list of tokens, or each of a list of one of these."""
    given = body.get("prompt")
    several = isinstance(given, list) and not _is_tokens(given)
    prompts = [_prompt(one) for one in (given if several else [given])]
    found = [prompt for prompt in prompts if prompt is not None]
    if not found or len(found) < len(prompts):
        raise UserError(f'"prompt" {given!r:.80} is no text, no tokens, and no list of these.')
    return found


def _prompt(value: Json) -> dict[str, Json] | None:
    if isinstance(value, str):
        return {"prompt": value}
    return {"tokens": value} if _is_tokens(value) else None


def _is_tokens(value: Json) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)
