"""Logits of given tokens by any path: one forward pass, or segments and steps through the cache."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.model.cache import init_cache, round_capacity
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
    out: np.ndarray | None = None,
    report: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Float32 logits [batch, length, vocab] on the current mesh; zeros on padding.

    Args:
        tokens, segment_ids: int32 [batch, length]; segment 0 is padding; default: all one segment.
        decode_from: prefill this many tokens, then feed one at a time through the cache.
        prefill_segment: prefill through the cache in segments of this many tokens.
        positions: default: from 0 in each segment.
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
    dtype = params["embed"].dtype
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


def _steps(length: int, decode_from: int | None, prefill_segment: int | None):
    """(start, stop) of each call: the prefill in segments, then one token at a time."""
    prefill = length if decode_from is None else min(decode_from, length)
    size = prefill_segment or max(prefill, 1)
    yield from ((i, min(i + size, prefill)) for i in range(0, prefill, size))
    yield from ((i, i + 1) for i in range(prefill, length))
