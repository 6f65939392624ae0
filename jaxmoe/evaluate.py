"""Logits of given tokens by any path: one forward pass, or segments and steps through the cache."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.mesh import current_mesh
from jaxmoe.model.cache import init_cache, round_capacity
from jaxmoe.model.transformer import forward, unembed

UNEMBED_TOKENS = 1024  # positions whose logits are on the device at once


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _hidden(config: Llama4Config, params, tokens, positions, segment_ids, cache):
    out = forward(config, params, tokens, positions, segment_ids, cache)
    return out.hidden, out.cache


_unembed = jax.jit(unembed, static_argnums=0)


def segment_positions(segment_ids: np.ndarray) -> np.ndarray:
    """Positions [batch, length] that restart in each segment; 0 on padding (segment 0).

    Raises:
        UserError: if a segment is not contiguous within its row.
    """
    positions = np.zeros_like(segment_ids)
    for row, ids in enumerate(segment_ids):
        starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))
        real = ids[starts][ids[starts] != 0]
        if len(set(real.tolist())) != len(real):
            raise UserError(f"segment_ids row {row} comes back to an earlier segment; renumber it.")
        run = np.repeat(starts, np.diff(starts, append=len(ids)))
        positions[row] = np.where(ids == 0, 0, np.arange(len(ids)) - run)
    return positions


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
        UserError: for tokens outside the vocabulary or segments that are not contiguous.
    """
    if tokens.min(initial=0) < 0 or tokens.max(initial=0) >= config.vocab_size:
        raise UserError(
            f"tokens reach {tokens.max()}; the vocabulary is 0 to {config.vocab_size - 1}."
        )
    batch, length = tokens.shape
    segment_ids = np.ones_like(tokens) if segment_ids is None else segment_ids
    positions = segment_positions(segment_ids) if positions is None else positions
    out = np.zeros((batch, length, config.vocab_size), np.float32) if out is None else out
    cached = decode_from is not None or prefill_segment is not None
    cache = _cache_for(config, params, batch, length) if cached else None
    for start, stop in _steps(length, decode_from, prefill_segment):
        part = (tokens[:, start:stop], positions[:, start:stop], segment_ids[:, start:stop])
        hidden, cache = _hidden(config, params, *(jnp.asarray(x) for x in part), cache)
        for i in range(start, stop, UNEMBED_TOKENS):
            j = min(i + UNEMBED_TOKENS, stop)
            real = segment_ids[:, i:j, None] != 0
            logits = _unembed(config, params, hidden[:, i - start : j - start])
            out[:, i:j] = np.where(real, np.asarray(logits), 0.0)
        report(stop - start)
    return out


def _cache_for(config: Llama4Config, params: dict, batch: int, length: int):
    mesh = current_mesh()
    return init_cache(config, batch, round_capacity(length, mesh), params["embed"].dtype, mesh)


def _steps(length: int, decode_from: int | None, prefill_segment: int | None):
    """(start, stop) of each call: the prefill in segments, then one token at a time."""
    prefill = length if decode_from is None else min(decode_from, length)
    size = prefill_segment or max(prefill, 1)
    yield from ((i, min(i + size, prefill)) for i in range(0, prefill, size))
    yield from ((i, i + 1) for i in range(prefill, length))
