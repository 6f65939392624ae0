"""Joining attention over disjoint sets of keys by the log-sum-exp of their scores."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Parts = list[tuple[Float[Array, "B H S d"], Float[Array, "B H S"]]]


def merge(parts: Parts) -> Float[Array, "B H S d"]:
    """Combines attention over disjoint sets of keys, each given as (output, log-sum-exp)."""
    return merge_with_lse(parts)[0]


def merge_with_lse(parts: Parts) -> tuple[Float[Array, "B H S d"], Float[Array, "B H S"]]:
    """As `merge`, with the log-sum-exp of all keys, so that the result can be merged again."""
    top = functools.reduce(jnp.maximum, (lse for _, lse in parts))
    weights = [lse_weight(lse, top) for _, lse in parts]
    total = sum(weights)
    mixed = sum(out * w[..., None] for (out, _), w in zip(parts, weights, strict=True))
    seen = total > 0
    total = jnp.where(seen, total, 1)
    out = (mixed / total[..., None]).astype(parts[0][0].dtype)
    return out, jnp.where(seen, top + jnp.log(total), -jnp.inf)


def lse_weight(lse: jax.Array, top: jax.Array) -> jax.Array:
    """exp(lse - top), and 0 where nothing was seen, also when nothing was seen anywhere."""
    return jnp.where(lse == -jnp.inf, 0.0, jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top)))
