"""A head's passes one after the other: a chain of drafted tokens, and the passes over a known text.

`draft_chain` guesses what follows; `unroll` makes the same passes from every place of a text at
once, with the text's tokens in place of those guessed (the training-time test of arXiv 2503.01840,
section 3.2).

Shape letters: as in `jaxmoe.model.eagle`; N drafted tokens.
"""

import functools
from typing import NamedTuple, cast

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from jaxmoe.eagle_config import EagleConfig
from jaxmoe.model.eagle import (
    DraftCache,
    Heads,
    at_use,
    attend,
    draft_logits,
    eagle_pass,
    fuse_states,
    heads,
    pass_input,
    pass_output,
)
from jaxmoe.model.embedding import embed
from jaxmoe.model.transformer import positions_of
from pallas_kernels.attention import Coords, merge


class Chain(NamedTuple):
    """Drafted tokens.

    Attributes:
        tokens: the likeliest of the draft vocabulary, each after the one before.
        logits: that they were chosen by, in float32.
        cache: with the keys of the tokens that the target has read, and of all passes.
    """

    tokens: Int[Array, "B N"]
    logits: Float[Array, "B N G"]
    cache: DraftCache


def draft_chain(
    config: EagleConfig,
    params: dict,
    table: Float[Array, "V D"],
    token_ids: Int[Array, "G"],
    tokens: Int[Array, "B S"],
    states: Float[Array, "B S states"],
    positions: Int[Array, "B S"],
    real: Int[Array, "B S"],
    cache: DraftCache,
    count: int,
    rows: Int[Array, "B"] | None = None,
) -> Chain:
    """Reads what the target has read since the last chain, then guesses `count` tokens.

    Args:
        params: the head's.
        table: the target's embeddings.
        token_ids: the target's id of each token of the draft vocabulary.
        tokens: the token after each place.
        states: the target's hidden states at each place.
        positions: of the places.
        real: 1, or 0 for padding, which ends a row. A row without any has positions beyond the
            cache's places, and its chain means nothing.
        cache: what earlier chains left; it has room up to the last position plus `count`.
        count: 1 or more; static.
        rows: as for `eagle_pass`.
    """
    run = functools.partial(eagle_pass, config, params, rows=rows)
    hidden = fuse_states(config, params, states)
    out = run(embed(table, tokens), hidden, positions, real, cache)
    last = jnp.sum(real, axis=1, keepdims=True) - 1
    last_hidden = jnp.take_along_axis(out.hidden, last[..., None], axis=1)
    position = jnp.take_along_axis(positions, last, axis=1)

    def guess(hidden):
        logits = draft_logits(config, params, hidden)[:, 0]
        return jnp.take(token_ids, jnp.argmax(logits, axis=-1)), logits

    def step(carry, _):
        token, hidden, position, cache = carry
        embedded = embed(table, token[:, None])
        out = run(embedded, hidden, position, jnp.ones_like(position), cache)
        token, logits = guess(out.hidden)
        return (token, out.hidden, position + 1, out.cache), (token, logits)

    first, logits = guess(last_hidden)
    carry = first, last_hidden, position + 1, out.cache
    (*_, filled), (more, more_logits) = lax.scan(step, carry, length=count - 1)

    def joined(one, others):
        return jnp.moveaxis(jnp.concatenate([one[None], others]), 0, 1)

    return Chain(joined(first, more), joined(logits, more_logits), cast(DraftCache, filled))


def unroll(
    config: EagleConfig,
    params: dict,
    table: Float[Array, "V D"],
    tokens: Int[Array, "B S"],
    states: Float[Array, "B S states"],
    segment_ids: Int[Array, "B S"],
    passes: int,
) -> list[Float[Array, "B S D"]]:
    """What each of `passes` passes puts out at every place of a text.

    Pass n, from 0, at place t is that of a chain which begins there, after n guesses that were all
    the text's own tokens: it takes token t + 1 + n, and guesses token t + 2 + n. It sees the first
    pass's keys of its segment up to t, and the keys of the later passes at t. Past the end of a
    segment it means nothing.

    Args:
        params: the head's.
        table: the target's embeddings.
        tokens: of the text, packed as for `jaxmoe.forward`.
        states: the target's hidden states at each token.
        segment_ids: which text a token belongs to; 0 is padding.
        passes: 1 or more; static.
    """
    params = at_use(config, params)
    positions = positions_of(segment_ids)
    coords = Coords(positions, segment_ids)
    hidden, found = fuse_states(config, params, states), []
    keys: list[Heads] = []
    for n in range(passes):
        embedded = embed(table, ahead(tokens, n + 1))
        x, residual = pass_input(config, params, embedded, hidden)
        new = heads(config, params, x, positions + n)
        keys.append(new)
        out = _attend_unrolled(config, new.q, keys, coords)
        hidden = pass_output(config, params, residual, out)
        found.append(hidden)
    return found


def ahead(x: Shaped[Array, "B S ..."], n: int) -> Shaped[Array, "B S ..."]:
    """What is `n` places after each place of a row; 0 past its end."""
    widths = [(0, 0), (0, min(n, x.shape[1])), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x[:, n:], widths)


def _attend_unrolled(
    config: EagleConfig, q: Float[Array, "B H S d"], keys: list[Heads], coords: Coords
) -> Float[Array, "B H S d"]:
    """Attention of a pass to the first pass's keys, and to the later ones' at each place."""
    first, *later = keys
    parts = [attend(config, q, first.k, first.v, coords)]
    repeats = q.shape[1] // first.k.shape[1]
    for _, k, v in later:
        k, v = (jnp.repeat(z.astype(jnp.float32), repeats, axis=1) for z in (k, v))
        score = jnp.sum(q.astype(jnp.float32) * k, axis=-1) * config.head_dim**-0.5
        parts.append((v, score))
    return merge(parts)
