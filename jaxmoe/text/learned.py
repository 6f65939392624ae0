"""Renders conversations to learn from: the tokens, and which of them the assistant says.

A special token of a rendered conversation is always the chat format's: the text of a message never
becomes one. So the turns are read off the rendered tokens themselves, whatever a message holds.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from jaxmoe.errors import UserError
from jaxmoe.images import PictureReader
from jaxmoe.text.chat import header_ids, render_chat
from jaxmoe.text.messages import Json
from jaxmoe.text.pictures import Prompt
from jaxmoe.text.tokenizer import Tokenizer


class Learned(NamedTuple):
    """A rendered conversation.

    Attributes:
        prompt: its tokens and pictures.
        learned: the tokens that the loss counts.
    """

    prompt: Prompt
    learned: Bool[np.ndarray, "tokens"]


def render_learned(
    messages: Json,
    tokenizer: Tokenizer,
    reader: PictureReader | None = None,
    tools: Json = None,
    images: Json = None,
) -> Learned:
    """A whole conversation, of which the loss counts what the assistant says.

    That is the content and tool calls of each assistant message, and the token that ends its turn,
    without which a model never stops. A message with `"weight": 0` does not count.

    Args:
        messages, tokenizer, reader, tools, images: as for `render_chat`.

    Raises:
        UserError: as `render_chat`, for a weight that is neither 0 nor 1, or if the chat template
            does not write one turn for each assistant message.
    """
    prompt = render_chat(messages, tokenizer, reader, tools, False, images)
    weights = [_weight(message, f"messages[{i}]") for i, message in enumerate(messages)]
    weights = [weight for weight in weights if weight is not None]
    turns = assistant_turns(np.array(prompt.tokens), tokenizer)
    if len(turns) != len(weights):
        raise UserError(
            f"the chat template writes {len(turns)} assistant turn(s) in Llama 4's format for "
            f"{len(weights)} assistant message(s), so it is unknown what is learned; correct the "
            "messages or the template"
        )
    learned = np.zeros(len(prompt.tokens), bool)
    for turn, weight in zip(turns, weights, strict=True):
        learned[turn] = weight
    return Learned(prompt, learned)


def assistant_turns(tokens: Integer[np.ndarray, "tokens"], tokenizer: Tokenizer) -> list[slice]:
    """Where the assistant speaks: from behind the header's blank line to the end of each turn.

    The token that ends a turn belongs to it. A token that is both of the blank line and of the
    answer, which then begins with a newline, does too.
    """
    header, gap = header_ids("assistant", tokenizer), tokenizer.encode("\n\n")
    begins = np.flatnonzero(tokens == header[0])
    ends = np.flatnonzero(np.isin(tokens, tokenizer.stop_ids)) + 1
    turns = []
    for begin, after in zip(begins, [*begins[1:], len(tokens)], strict=True):
        start = begin + len(header)
        if tokens[begin:start].tolist() != header:
            continue
        start += len(gap) if tokens[start : start + len(gap)].tolist() == gap else 0
        stop = ends[np.searchsorted(ends, start, side="right") :][:1]
        turns.append(slice(int(start), int(min([*stop, after]))))
    return turns


def _weight(message: Json, where: str) -> bool | None:
    """Whether an assistant message counts; None for a message of another role.

    Raises:
        UserError: if the weight is neither 0 nor 1, or 1 where the assistant does not speak.
    """
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise UserError(f"{where} has the weight {weight!r:.80}; write 0 or 1")
    if message["role"] == "assistant":
        return weight != 0
    if weight:
        raise UserError(f"{where} has a weight, but only what an assistant says is learned")
    return None
