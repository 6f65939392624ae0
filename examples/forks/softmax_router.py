"""A fork: a softmax router whose weights multiply the experts' output, as in Mixtral.

Llama 4 multiplies the experts' input by a sigmoid. What runs a decoder takes this file's `forward`:
`jaxmoe.generate(..., forward=forward)`, `token_logits(..., forward=forward)` and
`train(..., loss=next_token_loss(forward=forward))`.
"""

import functools

import jax
import jax.numpy as jnp

import jaxmoe
from jaxmoe.model.moe import Routing, moe


def choose(config: jaxmoe.Llama4Config, logits: jax.Array, real: jax.Array) -> Routing:
    """The k largest logits of each token, and their softmax among themselves."""
    chosen, expert = jax.lax.top_k(logits, config.num_experts_per_tok)
    weight = jax.nn.softmax(chosen.astype(jnp.float32)).astype(logits.dtype)
    return Routing(logits, jnp.where(real[..., None], expert, config.num_local_experts), weight)


softmax_moe = functools.partial(moe, choose=choose, weigh_output=True)
forward = functools.partial(jaxmoe.forward, moe=softmax_moe)
