"""Log-probabilities of tokens, in the shape of OpenAI's chat completions."""

from typing import Any, NamedTuple

from jaxmoe.text import Tokenizer

LEAST = -9999.0  # is written for anything below it: JSON has no infinity


class Logprob(NamedTuple):
    """The log-probability of a token, and the likeliest tokens in its place with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def entry(logprob: Logprob, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A token as `{"token", "logprob", "bytes", "top_logprobs"}`."""
    one = _named(logprob.token, logprob.logprob, tokenizer)
    top = [_named(token, value, tokenizer) for token, value in logprob.top]
    return {**one, "top_logprobs": top}


def _named(token: int, logprob: float, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A token that is a part of a character is named by its bytes, as by OpenAI.

    Without a tokenizer it is named by its id, as by vLLM's `return_tokens_as_token_ids`.
    """
    value = max(float(logprob), LEAST)
    if tokenizer is None:
        return {"token": f"token_id:{token}", "logprob": value, "bytes": None}
    raw = tokenizer.token_bytes(int(token), skip_special=False)
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return {"token": name, "logprob": value, "bytes": list(raw)}
