"""Logits of given tokens by any path: one forward pass, or prefill and decode through the cache.

And a greedy answer to a prompt of any length, with the logits that chose it, so that one path can
be held against another.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.compilation import KEEP_ROUNDINGS
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation.document import PREFILL_CHUNK, check_length, new_document, read
from jaxmoe.generation.features import with_pictures
from jaxmoe.images.picture import Picture
from jaxmoe.mesh import on_all_devices
from jaxmoe.model.kv_cache import init_cache, round_capacity
from jaxmoe.model.steps import Inputs, hidden_states, prefill, step
from jaxmoe.model.transformer import forward, positions_of, unembed

UNEMBED_TOKENS = 1024  # tokens of all rows whose logits are on the device at once


@functools.partial(jax.jit, static_argnums=0, compiler_options=KEEP_ROUNDINGS)
def _unembed(config: Llama4Config, params: dict, hidden: jax.Array) -> jax.Array:
    return on_all_devices(unembed(config, params, hidden))


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
    prefill_chunk: int | None = None,
    positions: np.ndarray | None = None,
    kv: str | None = None,
    pictures: Sequence[Sequence[Picture]] = (),
    out: np.ndarray | None = None,
    report: Callable[[int], None] = lambda count: None,
    forward: Callable = forward,
) -> np.ndarray:
    """Float32 logits [batch, length, vocab] on the current mesh; zeros on padding.

    Args:
        tokens, segment_ids: int32 [batch, length]; segment 0 is padding; default: all one segment.
        decode_from: prefill this many tokens, then feed one at a time through the cache.
        prefill_chunk: prefill through the cache in chunks of this many tokens.
        positions: default: from 0 in each segment.
        kv: how the cache stores keys and values; default: as the parameters.
        pictures: of each row, those whose features its image tokens stand for; default: none.
        out: where to write, for results larger than memory.
        report: called with the number of tokens a row that each call has done.
        forward: `jaxmoe.forward`, or a fork's function of the same arguments.

    Raises:
        UserError: for tokens outside the vocabulary, positions outside the context, segments that
            are not contiguous, or pictures that are not those of the tokens.
    """
    segment_ids = np.ones_like(tokens) if segment_ids is None else segment_ids
    if positions is None:
        positions = np.asarray(positions_of(jnp.asarray(segment_ids)))
    _check_tokens(config, tokens, segment_ids, positions)
    batch, length = tokens.shape
    texts = {f"row {i}": row for i, row in enumerate(tokens)}
    rows, place = with_pictures(config, params, texts, pictures)
    feed = functools.partial(
        prefill,
        config,
        params,
        np.stack(rows),
        positions=positions,
        segment_ids=segment_ids,
        readout=hidden_states,
        place=place,
        forward=forward,
    )
    out = np.zeros((batch, length, config.vocab_size), np.float32) if out is None else out
    cached = decode_from is not None or prefill_chunk is not None
    dtype = kv or params["embed"].dtype
    cache = init_cache(config, batch, round_capacity(length), dtype) if cached else None
    prefilled = length if decode_from is None else min(decode_from, length)
    done = 0
    for chunk, stop in ((prefill_chunk or length, prefilled), (1, length)):
        for fed in feed(cache, chunk=chunk, start=done, stop=stop):
            part = slice(done, fed.done)
            _write_logits(config, params, fed.output, segment_ids[:, part], out[:, part])
            report(fed.done - done)
            done, cache = fed.done, fed.cache
    return out


def _check_tokens(
    config: Llama4Config, tokens: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray
) -> None:
    """Raises a UserError if the model cannot be given such tokens, segments or positions."""
    wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if wrong.size:
        raise UserError(f"token {wrong[0]} is not in the vocabulary, 0 to {config.vocab_size - 1}.")
    check_contiguous(segment_ids)
    if positions.max(initial=0) >= config.max_position_embeddings:
        raise UserError(
            f"position {positions.max()} is past the model's context of "
            f"{config.max_position_embeddings} tokens; shorten the tokens."
        )


def _write_logits(config: Llama4Config, params: dict, hidden, segment_ids, out) -> None:
    """The logits of a chunk's hidden states, a part at a time; zeros on padding."""
    batch, length = segment_ids.shape
    width = max(1, UNEMBED_TOKENS // batch)
    for i in range(0, length, width):
        j = min(i + width, length)
        logits = np.asarray(_unembed(config, params, hidden[:, i:j]))
        out[:, i:j] = np.where(segment_ids[:, i:j, None] != 0, logits, 0.0)


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
    prefill_chunk: int = PREFILL_CHUNK,
    stop_ids: Sequence[int] = (),
    report: Callable[[int], None] = lambda count: None,
) -> Answer:
    """Prefills a prompt through the cache, then writes its likeliest next tokens.

    Memory is that of the cache and of one chunk, whatever the prompt's length.

    Args:
        count: tokens to write, at most; fewer if one of `stop_ids` is written, which is kept.
        prefill_chunk: prompt tokens that one step takes, at most.
        report: called with the number of tokens that each step has taken.

    Raises:
        UserError: if prompt and answer do not fit the model's context.
    """
    if not prompt or count < 1:
        raise UserError(
            f"{len(prompt)} tokens of prompt and {count} to write; use 1 or more of each."
        )
    document = new_document(config, params, len(prompt) + count)
    steps, done = read(config, params, document, prompt[:-1], prefill_chunk=prefill_chunk), 0
    for document in steps:
        report(document.length - done)
        done = document.length
    cache, tokens, logits = document.cache, [prompt[-1]], []
    while len(logits) < count and not (logits and tokens[-1] in stop_ids):
        fed = (tokens[-1], done + len(logits), 1)
        new = Inputs(*(jnp.full((1, 1), x) for x in fed))
        hidden, cache = step(config, params, new, cache, readout=hidden_states)
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
    inputs = Inputs(row, positions, jnp.ones_like(row))
    hidden, _ = step(config, params, inputs, None, readout=hidden_states)
    return np.asarray(_unembed(config, params, hidden[:, -count:]))[0]
