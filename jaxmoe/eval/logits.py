"""Logits of given tokens by any path: one forward pass, or segments and steps through the cache.

And a greedy answer to a prompt of any length, with the logits that chose it, so that one path can
be held against another.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation.document import SEGMENT, check_length, new_document, read
from jaxmoe.model.kv_cache import init_cache, round_capacity
from jaxmoe.model.transformer import forward, positions_of, unembed

UNEMBED_TOKENS = 1024  # tokens of all rows whose logits are on the device at once


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _hidden(config: Llama4Config, params, tokens, positions, segment_ids, cache):
    out = forward(config, params, tokens, positions, segment_ids, cache)
    return out.hidden, out.cache


_unembed = jax.jit(unembed, static_argnums=0)


def check_contiguous(segment_ids: np.ndarray) -> None:
    """Raises a UserError if a segment, padding aside, is not contiguous within its row."""
    for row, ids in enumerate(segment_ids):
        real = ids[ids != 0]
        runs = real[np.flatnonzero(np.diff(real, prepend=0))]
        if len(set(runs.tolist())) != len(runs):
            raise UserError(f"segment_ids row {row} comes back to an earlier segment; renumber it.")


def token_logits(
    config: Llama4Config,
    params: dict,
    tokens: np.ndarray,
    segment_ids: np.ndarray | None = None,
    *,
    decode_from: int | None = None,
    prefill_segment: int | None = None,
    positions: np.ndarray | None = None,
    kv: str | None = None,
    out: np.ndarray | None = None,
    report: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Float32 logits [batch, length, vocab] on the current mesh; zeros on padding.

    Args:
        tokens, segment_ids: int32 [batch, length]; segment 0 is padding; default: all one segment.
        decode_from: prefill this many tokens, then feed one at a time through the cache.
        prefill_segment: prefill through the cache in segments of this many tokens.
        positions: default: from 0 in each segment.
        kv: how the cache stores keys and values; default: as the parameters.
        out: where to write, for results larger than memory.
        report: called with the number of tokens a row that each call has done.

    Raises:
        UserError: for tokens outside the vocabulary, positions outside the context, or segments
            that are not contiguous.
    """
    wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if wrong.size:
        raise UserError(f"token {wrong[0]} is not in the vocabulary, 0 to {config.vocab_size - 1}.")
    batch, length = tokens.shape
    segment_ids = np.ones_like(tokens) if segment_ids is None else segment_ids
    check_contiguous(segment_ids)
    if positions is None:
        positions = np.asarray(positions_of(jnp.asarray(segment_ids)))
    if positions.max(initial=0) >= config.max_position_embeddings:
        raise UserError(
            f"position {positions.max()} is past the model's context of "
            f"{config.max_position_embeddings} tokens; shorten the tokens."
        )
    out = np.zeros((batch, length, config.vocab_size), np.float32) if out is None else out
    cached = decode_from is not None or prefill_segment is not None
    dtype = kv or params["embed"].dtype
    cache = init_cache(config, batch, round_capacity(length), dtype) if cached else None
    for start, stop in _steps(length, decode_from, prefill_segment):
        part = (tokens[:, start:stop], positions[:, start:stop], segment_ids[:, start:stop])
        hidden, cache = _hidden(config, params, *(jnp.asarray(x) for x in part), cache)
        width = max(1, UNEMBED_TOKENS // batch)
        for i in range(start, stop, width):
            j = min(i + width, stop)
            real = segment_ids[:, i:j, None] != 0
            logits = _unembed(config, params, hidden[:, i - start : j - start])
            out[:, i:j] = np.where(real, np.asarray(logits), 0.0)
        report(stop - start)
    return out


class Answer(NamedTuple):
    """Tokens in the order of writing, and the float32 logits [tokens, vocab] that chose each."""

    tokens: tuple[int, ...]
    logits: np.ndarray


def greedy_answer(
    config: Llama4Config,
    params: dict,
    prompt: Sequence[int],
    count: int,
    *,
    segment: int = SEGMENT,
    stop_ids: Sequence[int] = (),
    report: Callable[[int], None] = lambda count: None,
) -> Answer:
    """Reads a prompt through the cache in segments, then writes its likeliest next tokens.

    Memory is that of the cache and of one segment, whatever the prompt's length.

    Args:
        count: tokens to write, at most; fewer if one of `stop_ids` is written, which is kept.
        segment: tokens to read at once.
        report: called with the number of tokens that each call has read.

    Raises:
        UserError: if prompt and answer do not fit the model's context.
    """
    if not prompt or count < 1:
        raise UserError(
            f"{len(prompt)} tokens of prompt and {count} to write; use 1 or more of each."
        )
    document = new_document(config, params, len(prompt) + count)
    steps, done = read(config, params, document, prompt[:-1], segment=segment), 0
    for document in steps:
        report(document.length - done)
        done = document.length
    cache, tokens, logits = document.cache, [prompt[-1]], []
    while len(logits) < count and not (logits and tokens[-1] in stop_ids):
        fed = (tokens[-1], done + len(logits), 1)
        hidden, cache = _hidden(config, params, *(jnp.full((1, 1), x) for x in fed), cache)
        logits.append(np.asarray(_unembed(config, params, hidden)[0, 0]))
        tokens.append(int(logits[-1].argmax()))
        report(1)
    return Answer(tuple(tokens[1:]), np.stack(logits))


def last_logits(
    config: Llama4Config, params: dict, tokens: Sequence[int], count: int
) -> np.ndarray:
    """Float32 logits [count, vocab] of the last tokens, in one forward pass without a cache.

    Raises:
        UserError: if the tokens do not fit the model's context.
    """
    check_length(config, len(tokens))
    row = jnp.asarray(tokens, jnp.int32)[None]
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    hidden, _ = _hidden(config, params, row, positions, jnp.ones_like(row), None)
    return np.asarray(_unembed(config, params, hidden[:, -count:]))[0]


def _steps(length: int, decode_from: int | None, prefill_segment: int | None):
    """(start, stop) of each call: the prefill in segments, then one token at a time."""
    prefill = length if decode_from is None else min(decode_from, length)
    size = prefill_segment or max(prefill, 1)
    yield from ((i, min(i + size, prefill)) for i in range(0, prefill, size))
    yield from ((i, i + 1) for i in range(prefill, length))
