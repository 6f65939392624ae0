"""Choosing the next token: greedy, temperature, top-k, top-p.

A token's random numbers come from the seed, its request's id and its index in the answer, so they
depend neither on the other rows of a batch nor on the mesh.
"""

import dataclasses
import math
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from jaxmoe.errors import UserError
from jaxmoe.generation_config import FILE, read_generation_config

NO_TOKEN = -1  # in place of a token, where the logits are not finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose a token.

    Attributes:
        temperature: divides the logits; 0 takes the largest.
        top_p: keeps a token while the probability of all larger ones is at most this.
        top_k: keeps this many tokens; 0 keeps all.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature} is not 0 or more; use 0 for greedy.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} is not above 0 and at most 1; use 1 to keep all.")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} is below 0; use 0 to keep all.")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed {self.seed} is not between 0 and 2**31 - 1.")


def sampling_of(checkpoint: str | Path, **wanted: Any) -> Sampling:
    """How a checkpoint's `generation_config.json` says to choose, else as `Sampling` does.

    Args:
        checkpoint: its folder.
        wanted: fields of `Sampling` that come before the checkpoint's; None leaves it the choice.

    Raises:
        UserError: if the file is broken, or a value out of range.
    """
    try:
        sampling = Sampling(**dict(read_generation_config(checkpoint).sampling))
    except UserError as error:
        raise UserError(f"{Path(checkpoint) / FILE}: {error}") from None
    given = {name: value for name, value in wanted.items() if value is not None}
    return dataclasses.replace(sampling, **given)


def _unflatten(_: None, values: tuple) -> Sampling:
    """A `Sampling` of these values; traced values cannot pass the checks, so none are made."""
    sampling = object.__new__(Sampling)
    for field, value in zip(dataclasses.fields(Sampling), values, strict=True):
        object.__setattr__(sampling, field.name, value)
    return sampling


# Arguments of compiled programs: another seed or temperature compiles nothing again.
jax.tree_util.register_pytree_node(Sampling, lambda s: (tuple(vars(s).values()), None), _unflatten)


def request_hash(request_id: object) -> np.uint32:
    """A stable number for a request's id."""
    return np.uint32(zlib.crc32(str(request_id).encode()))


def sample(
    sampling: Sampling,
    logits: Float[Array, "B V"],
    request: UInt[Array, "B"],
    index: Int[Array, "B"],
) -> Int[Array, "B"]:
    """The next token of each row; `NO_TOKEN` where a logit is NaN or infinity.

    Args:
        request: `request_hash` of the row's request.
        index: how many tokens the row has generated before.
    """
    seed = jax.random.key(sampling.seed)

    def choose(row, request, index):
        key = jax.random.fold_in(jax.random.fold_in(seed, request), index)
        return jax.random.categorical(key, row)

    def draw():
        scaled = (logits - logits.max(-1, keepdims=True)) / sampling.temperature
        return jax.vmap(choose)(keep_likely(sampling, scaled), request, index)

    greedy = sampling.temperature == 0
    token = jax.lax.cond(greedy, lambda: jnp.argmax(logits, axis=-1), draw)
    finite = jnp.isfinite(logits).all(axis=-1)  # XLA's maximum may drop a NaN
    return jnp.where(finite, token, NO_TOKEN).astype(jnp.int32)


def keep_likely(sampling: Sampling, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """-inf for the tokens that top-k and top-p leave out."""

    def leave_out():
        order = jnp.argsort(-logits, axis=-1)
        probability = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        kept = jnp.cumsum(probability, axis=-1) - probability <= sampling.top_p
        kept &= (jnp.arange(logits.shape[-1]) < sampling.top_k) | (sampling.top_k == 0)
        kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
        return jnp.where(kept, logits, -jnp.inf)

    keep_all = jnp.logical_and(sampling.top_p == 1, sampling.top_k == 0)
    return jax.lax.cond(keep_all, lambda: logits, leave_out)
