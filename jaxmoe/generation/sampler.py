"""Choosing the next token of each row by the row's own settings, with the vocabulary sharded.

A token is chosen in vLLM's order: log-probabilities of the model itself, if they are wanted; tokens
that are not allowed; bias; penalties of repetition, frequency and presence; temperature; min-p;
top-k; top-p; the draw. Each works on what the one before it has left, so that top-p's probabilities
are those among the tokens that min-p and top-k keep.

Nothing sorts the vocabulary and no device holds all of it (`jaxmoe.generation.vocab`). A token is a
function of its row's logits and settings: neither the other rows nor the mesh change it.

Shape letters: B rows, V vocabulary, L tokens of it that a device has, R rows of the counts.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, UInt, UInt32

from jaxmoe import mesh as meshes
from jaxmoe.generation.counts import Counts
from jaxmoe.generation.sampling import NO_TOKEN
from jaxmoe.generation.vocab import (
    Part,
    gumbel,
    is_finite,
    kept,
    mass,
    number,
    pad_logits,
    specs,
    this_part,
    total_mass,
)
from jaxmoe.generation.vocab_logprobs import Logprobs, part_logprobs

WORD = 32  # tokens of a mask's word


class Draws(NamedTuple):
    """How each row draws; a filter that no row uses is None and costs nothing.

    Attributes:
        seed: with the next two, all that the random numbers depend on.
        request: `request_hash` of the row's request.
        index: how many tokens the row has generated before.
        temperature: divides the logits; 0 takes the largest, whatever the rest says.
        top_k: keeps this many tokens; 0 keeps all.
        top_p: keeps a token while the probability of all larger ones is at most this; 1 keeps all.
        min_p: keeps tokens of at least this part of the largest probability; 0 keeps all.
    """

    seed: Integer[Array, "B"]
    request: UInt[Array, "B"]
    index: Int[Array, "B"]
    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"] | None = None
    top_p: Float[Array, "B"] | None = None
    min_p: Float[Array, "B"] | None = None


class Penalties(NamedTuple):
    """Changes of the logits of tokens that a row has had.

    Attributes:
        repetition: divides positive logits of prompt and answer, multiplies the others; 1 for none.
        presence: subtracted from the logits of the answer's tokens.
        frequency: subtracted once for each time that the answer has the token.
        drafts: tokens that the answer has beside those that are counted; -1 for none.
    """

    repetition: Float[Array, "B"]
    presence: Float[Array, "B"]
    frequency: Float[Array, "B"]
    drafts: Int[Array, "B K"] | None = None


class Bias(NamedTuple):
    """Values that are added to logits.

    Attributes:
        ids: [B, K] tokens; -1 for none.
        value: [B, K]; -inf forbids the token.
    """

    ids: Int[Array, "B K"]
    value: Float[Array, "B K"]


class Choice(NamedTuple):
    """How the tokens of a batch are chosen; what is None costs nothing.

    Attributes:
        draws: None takes the largest logit in all rows.
        allowed: [B, ceil(V / 32)]; bit i of word w allows token 32 w + i.
    """

    draws: Draws | None = None
    penalties: Penalties | None = None
    bias: Bias | None = None
    allowed: UInt32[Array, "B words"] | None = None


class Chosen(NamedTuple):
    """A token for each row.

    Attributes:
        token: `NO_TOKEN` where a logit is NaN or infinity, or no token is allowed.
        logprob: [B], of the token, by the model alone: before bias, penalties and temperature.
        top_ids: [B, top], the tokens that the model finds most probable.
        top_logprobs: [B, top], theirs.
    """

    token: Int[Array, "B"]
    logprob: Float[Array, "B"] | None = None
    top_ids: Int[Array, "B top"] | None = None
    top_logprobs: Float[Array, "B top"] | None = None


def choose(
    logits: Float[Array, "B V"],
    choice: Choice,
    counts: Counts | None = None,
    rows: Int[Array, "B"] | None = None,
    *,
    top: int | None = None,
) -> Chosen:
    """The next token of each row.

    Args:
        logits: the model's own, in float32.
        counts: what penalties are about.
        rows: each row's row of the counts; default: the same.
        top: how many log-probabilities to give beside the token's; None for not even that.
    """

    def body(logits, choice, counts, rows):
        part = this_part(size, logits.shape[-1])
        return _choose(part, logits, choice, None if counts is None else _of(counts, rows), top)

    size = logits.shape[-1]
    rows = jnp.arange(len(logits)) if rows is None else rows
    logits = pad_logits(logits)
    spec, by_row, state = specs(logits)
    run = meshes.per_device(body, (spec, by_row, state, by_row), by_row)
    return run(logits, choice, counts, rows)


def _of(counts: Counts, rows: Int[Array, "B"]) -> Counts:
    return Counts(counts.generated[rows], counts.prompt[rows])


def _choose(
    part: Part, logits: Float[Array, "B L"], choice: Choice, counts: Counts | None, top: int | None
) -> Chosen:
    """`choose` on a device that has a part of the vocabulary; `counts` is by rows of the batch."""
    values = _adjusted(part, logits, choice, counts)
    highest, token = part.largest(values)
    if choice.draws is not None:
        scores = _scores(part, values, highest, choice.draws)
        drawn = part.largest(scores)[1]
        token = jnp.where(choice.draws.temperature > 0, drawn, token)
    finite = is_finite(part, logits)
    token = jnp.where(finite & jnp.isfinite(highest), token, NO_TOKEN)
    return Chosen(token, *_model_logprobs(part, logits, token, finite, top))


def _model_logprobs(part: Part, logits, token, finite, top: int | None) -> Logprobs | tuple:
    return () if top is None else part_logprobs(part, logits, token, finite, top)


def _adjusted(
    part: Part, logits: Float[Array, "B L"], choice: Choice, counts: Counts | None
) -> Float[Array, "B L"]:
    """Logits with -inf for what is not allowed, bias and penalties."""
    if choice.allowed is not None:
        logits = jnp.where(_allowed(part, choice.allowed), logits, -jnp.inf)
    if choice.bias is not None:
        logits = _biased(part, logits, choice.bias)
    if choice.penalties is not None:
        if counts is None:
            raise ValueError("penalties need counts")
        logits = _penalized(part, logits, choice.penalties, counts)
    return logits


def _allowed(part: Part, words: UInt32[Array, "B words"]) -> Bool[Array, "B L"]:
    """The bits of this part's tokens, which may begin and end within a word."""
    here = len(part.ids)
    first, few = part.start // WORD, here // WORD + 2
    words = jnp.pad(words, ((0, 0), (0, few)))
    words = lax.dynamic_slice_in_dim(words, first, few, axis=1)
    bits = (words[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
    bits = bits.astype(bool).reshape(len(words), few * WORD)
    return lax.dynamic_slice_in_dim(bits, part.start - first * WORD, here, axis=1)


def _biased(part: Part, logits: Float[Array, "B L"], bias: Bias) -> Float[Array, "B L"]:
    rows = jnp.arange(len(logits))[:, None]
    return logits.at[rows, part.local_index(bias.ids)].add(bias.value, mode="drop")


def _penalized(
    part: Part, logits: Float[Array, "B L"], penalties: Penalties, counts: Counts
) -> Float[Array, "B L"]:
    *factors, drafts = penalties
    repetition, presence, frequency = (x[:, None] for x in factors)
    generated = counts.generated
    if drafts is not None:
        at = jnp.arange(len(logits))[:, None], part.local_index(drafts)
        generated = generated.at[at].add(1, mode="drop")
    times, had = generated.astype(logits.dtype), generated > 0
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(had | counts.prompt, repeated, logits)
    return logits - frequency * times - presence * had


def _scores(
    part: Part, values: Float[Array, "B L"], highest: Float[Array, "B"], draws: Draws
) -> Float[Array, "B L"]:
    """Numbers whose largest is at a token drawn from the kept ones (the Gumbel-max trick)."""
    temperature = jnp.where(draws.temperature > 0, draws.temperature, 1)
    scaled = (values - highest[:, None]) / temperature[:, None]
    return keep_likely(part, scaled, draws) + gumbel(part, draws.seed, draws.request, draws.index)


def keep_likely(part: Part, values: Float[Array, "B L"], draws: Draws) -> Float[Array, "B L"]:
    """-inf for the tokens that min-p, top-k and top-p leave out, in this order.

    Args:
        values: log-probabilities less the largest of the row, after temperature.
    """
    if draws.min_p is not None:
        values = _keep(values, jnp.exp(values) >= draws.min_p[:, None])
    if draws.top_k is not None:
        values = _keep(values, _in_top_k(part, values, draws.top_k))
    if draws.top_p is not None:
        values = _keep(values, _in_top_p(part, values, draws.top_p))
    return values


def _keep(values: Float[Array, "B L"], kept: Bool[Array, "B L"]) -> Float[Array, "B L"]:
    return jnp.where(kept, values, -jnp.inf)


def _in_top_k(
    part: Part, values: Float[Array, "B L"], top_k: Int[Array, "B"]
) -> Bool[Array, "B L"]:
    before = jnp.where(top_k > 0, top_k - 1, jnp.inf)
    return kept(part, values, lambda masks: number(part, masks), before)


def _in_top_p(
    part: Part, values: Float[Array, "B L"], top_p: Float[Array, "B"]
) -> Bool[Array, "B L"]:
    weights = jnp.exp(values)
    before = jnp.where(top_p < 1, top_p * total_mass(part, weights), jnp.inf)
    return kept(part, values, lambda masks: mass(part, weights, masks), before)
