"""Checks a loaded model by the entropy and the loss of a sentence, which bad conversions raise."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.model.params import named_params
from jaxmoe.model.steps import Inputs, step
from jaxmoe.model.transformer import unembed
from jaxmoe.text import Tokenizer

# A text that every model of English has been trained on, the demo model too.
TEXT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and "
    "void; and darkness was upon the face of the deep. And the Spirit of God moved upon the face "
    "of the waters."
)
# Of the entropy of guessing evenly, which a model of random weights nearly has. The demo model's
# surprise is 0.38 of it; with the halves of its rotary heads mixed up 0.46, with gate and up
# exchanged 0.52. A model of some billion parameters is surprised far less.
PEAKED, EVEN, KNOWN = 0.002, 0.995, 0.45


class Speech(NamedTuple):
    """The self-test's figures: means over its tokens, as fractions of ln(vocabulary size).

    Attributes:
        entropy: of the predictions.
        surprise: at the tokens that follow; None without a tokenizer.
    """

    entropy: float
    surprise: float | None


def self_test(config: Llama4Config, params: dict, tokenizer: Tokenizer | None) -> Speech:
    """Runs a sentence, or without a tokenizer some tokens, on the current mesh.

    Raises:
        UserError: if logits are not finite, all is predicted alike or one thing always, or the
            sentence surprises as it would a model that does not know English.
    """
    tokens = _tokens(config, tokenizer)
    logits = np.asarray(_logits(config, params, jnp.asarray(tokens)[None]), np.float64)[0]
    if not np.isfinite(logits).all():
        named = " and ".join(not_finite(config, params)[:2])
        because = f", as {named} holds NaN or infinity" if named else ""
        raise UserError(f"self-test: logits are not finite{because}; convert the checkpoint again.")
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= logits.max(-1, keepdims=True)
    guess = math.log(config.vocab_size)
    entropy = float(-(np.exp(log_p) * log_p).sum(-1).mean()) / guess
    if not PEAKED < entropy < EVEN:
        raise UserError(
            f"self-test: the entropy of predictions is {entropy:.3f} of that of guessing, so the "
            "model says nothing; its layout is wrong, or it was never trained."
        )
    if tokenizer is None:
        return Speech(entropy, None)
    surprise = float(-log_p[np.arange(len(tokens) - 1), tokens[1:]].mean()) / guess
    if surprise > KNOWN:
        raise UserError(
            f"self-test: a plain sentence surprises the model {surprise:.2f} times as much as "
            "guessing would; its layout is wrong, or it does not know English."
        )
    return Speech(entropy, surprise)


def not_finite(config: Llama4Config, params: dict) -> list[str]:
    """Names of the parameters that hold NaN or infinity.

    Reads all of them, which takes a while: to be asked once logits say that there are some.
    """
    stored = {name: w for name, (_, w) in named_params(config, params).items()}
    finite = jax.tree.map(_is_finite, stored)
    return [name for name, parts in finite.items() if not all(jax.tree.leaves(parts))]


@jax.jit
def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _tokens(config: Llama4Config, tokenizer: Tokenizer | None) -> np.ndarray:
    if tokenizer is not None:
        return np.asarray(tokenizer.encode(TEXT, bos=True), np.int32)
    return np.random.default_rng(0).integers(0, config.vocab_size, 64, np.int32)


def _logits(config: Llama4Config, params: dict, tokens: jax.Array) -> jax.Array:
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    inputs = Inputs(tokens, positions, jnp.ones_like(tokens))
    return step(config, params, inputs, None, readout=unembed)[0]
