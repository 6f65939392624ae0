"""How many tokens of a head's chains its target accepts, measured on texts that are there.

Chains begin at every place of a text and follow its own tokens, so that neither target nor head
generates anything: `jaxmoe.model.eagle_unroll.unroll`.

Shape letters: B rows, S tokens a row, D embed, N tokens of a chain.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from jaxmoe.checkpoint.heads import Head
from jaxmoe.compilation import KEEP_ROUNDINGS
from jaxmoe.config import Llama4Config
from jaxmoe.eagle_config import EagleConfig, default_layer_ids
from jaxmoe.errors import UserError
from jaxmoe.mesh import on_all_devices
from jaxmoe.model.eagle import draft_logits
from jaxmoe.model.eagle_unroll import ahead, unroll
from jaxmoe.model.transformer import forward, positions_of
from jaxmoe.train.cross_entropy import token_losses

LOW = 0.1  # share of first guesses accepted, below which something is wrong


class Acceptance(NamedTuple):
    """What a target accepts at one temperature.

    Attributes:
        temperature: of the target; 0 takes its likeliest token.
        accepted: for each number of tokens from 1 on, the share of chains of which so many are
            accepted.
        tokens_per_step: how many tokens a step of the target gains: those accepted, and its own.
        chains: how many there were.
    """

    temperature: float
    accepted: tuple[float, ...]
    tokens_per_step: float
    chains: int


def measure(
    target: Llama4Config,
    params: dict,
    head: Head,
    tokens: Integer[np.ndarray, "B S"],
    temperatures: Sequence[float],
    count: int,
) -> list[Acceptance]:
    """Drafts `count` tokens from every place of texts, at each of the temperatures.

    A guess is the likeliest token of the draft vocabulary, and is accepted with the probability
    that the target gives it, at temperature 0 if it is the target's likeliest. That of a chain's
    first n tokens is the product, along the text's own tokens. On what the target itself writes
    greedily this is exact at temperature 0; otherwise it is an estimate, since later guesses follow
    the text and not the guess before.

    Args:
        target: the target's config.
        params: the target's.
        head: on the same mesh.
        tokens: texts, one a row.
        temperatures: of the target.
        count: tokens of a chain.

    Raises:
        UserError: if the texts are too short, or have tokens that the target does not know.
    """
    length = tokens.shape[1]
    if length < count + 2:
        raise UserError(
            f"rows of {length} tokens are too short for chains of {count}; use {count + 2} or more."
        )
    if tokens.min() < 0 or tokens.max() >= target.vocab_size:
        raise UserError(f"the texts have tokens outside the vocabulary of {target.vocab_size}.")
    rows = jnp.asarray(tokens, jnp.int32)
    hidden, drafts = _drafted(head.config, target, count, params, *head[1:], rows)
    found = []
    for temperature in temperatures:
        parts = [
            _accepted(target, params, ahead(hidden, n), draft, jnp.float32(temperature))
            for n, draft in enumerate(drafts, start=1)
        ]
        found.append(_acceptance(temperature, np.asarray(jax.device_get(parts), np.float64)))
    return found


def _acceptance(temperature: float, parts: Float[np.ndarray, "N B S"]) -> Acceptance:
    """The means over all chains that lie within a row, of each place's probabilities."""
    count, _, length = parts.shape
    within = parts[:, :, : length - count]
    shares = tuple(np.cumprod(within, axis=0).mean((1, 2)).tolist())
    return Acceptance(temperature, shares, 1 + sum(shares), within[0].size)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=KEEP_ROUNDINGS)
def _drafted(
    config: EagleConfig,
    target: Llama4Config,
    count: int,
    params: dict,
    head: dict,
    token_ids: Int[Array, "G"],
    tokens: Int[Array, "B S"],
) -> tuple[Float[Array, "B S D"], list[Int[Array, "B S"]]]:
    """The target's last hidden states, and the guesses of each pass."""
    segment_ids = jnp.ones_like(tokens)
    positions = positions_of(segment_ids)
    out = forward(target, params, tokens, positions, segment_ids, states=config.layer_ids)
    states = cast(jax.Array, out.states)
    passes = unroll(config, head, params["embed"], tokens, states, segment_ids, count)
    logits = (draft_logits(config, head, hidden) for hidden in passes)
    return out.hidden, [jnp.take(token_ids, jnp.argmax(x, axis=-1)) for x in logits]


@functools.partial(jax.jit, static_argnums=0)
def _accepted(
    target: Llama4Config, params: dict, hidden: Float[Array, "B S D"], draft, temperature
) -> Float[Array, "B S"]:
    """The probability with which the target says each guess [B, S] itself, in float32."""
    warm = jnp.where(temperature > 0, temperature, 1.0)
    found = token_losses(target, params, hidden.astype(jnp.float32) / warm, draft)
    likeliest = found.right.astype(jnp.float32)
    return on_all_devices(jnp.where(temperature > 0, jnp.exp(-found.nats), likeliest))


def other_layer_ids(config: EagleConfig, layers: int) -> list[tuple[int, ...]]:
    """The layers that a head may mean instead, of a target of so many."""
    near = [tuple(i + step for i in config.layer_ids) for step in (1, -1)]
    all_of_them = dict.fromkeys([*near, default_layer_ids(layers)])
    fits = (ids for ids in all_of_them if all(0 <= i <= layers for i in ids))
    return [ids for ids in fits if ids != config.layer_ids]


def warning_of(
    target: Llama4Config,
    params: dict,
    head: Head,
    tokens: Integer[np.ndarray, "B S"],
    found: Sequence[Acceptance],
) -> str | None:
    """A sentence about a head that had better read other layers, or guesses badly; else None.

    Of first guesses fewer than `LOW` are accepted, or more with the layers next to those that the
    head reads, or the default ones, by a twentieth and three standard errors.

    Args:
        target, params, head, tokens: as for `measure`.
        found: what it returned.
    """
    first = max(found, key=lambda one: one.accepted[0])
    share = first.accepted[0]
    said = f"of the first guesses {share:.1%} are accepted with the inputs of layers "
    said += ",".join(map(str, head.config.layer_ids))
    best, better = 0.0, ()
    for ids in other_layer_ids(head.config, target.num_hidden_layers):
        other = head._replace(config=dataclasses.replace(head.config, layer_ids=ids))
        (one,) = measure(target, params, other, tokens, [first.temperature], 1)
        if one.accepted[0] > best:
            best, better = one.accepted[0], ids
    error = (max(share, best) * (1 - max(share, best)) / first.chains) ** 0.5
    if best - share > max(0.05 * share, 3 * error):
        others = ",".join(map(str, better))
        return (
            f"{said}, and {best:.1%} with those of {others}: convert the head again with "
            f"--layer-ids {others}"
        )
    if share >= LOW:
        return None
    return (
        f"{said}, and no more with its neighbours: the head was trained for another model or with "
        "other layers (convert --layer-ids), or too little"
    )


def figures(found: Sequence[Acceptance]) -> list[dict[str, Any]]:
    """The numbers as JSON has them."""
    return [one._asdict() | {"accepted": list(one.accepted)} for one in found]
