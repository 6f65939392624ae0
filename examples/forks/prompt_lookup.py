"""A fork: greedy decoding that guesses several tokens a step from the text so far.

What came after the last two tokens when they stood together before is the guess. One step of the
model checks it: tokens that the model would have chosen itself stay, the others are dropped from
the cache. The tokens are those of plain greedy decoding; texts that repeat themselves, such as
edited code or answers that quote a document, take fewer steps.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import jaxmoe
from jaxmoe.generation.document import new_document, read, truncate
from jaxmoe.model.steps import Inputs, step

NGRAM, GUESSES = 2, 4  # how many tokens must be the same, and how many are guessed at most


def guess(text: list[int], most: int) -> list[int]:
    """What followed the last time that the text's last tokens stood together."""
    end = text[-NGRAM:]
    for i in range(len(text) - NGRAM - 1, -1, -1):
        if text[i : i + NGRAM] == end:
            return text[i + NGRAM : i + NGRAM + max(most, 0)]
    return []


def likeliest(config: jaxmoe.Llama4Config, params: dict, hidden: jax.Array) -> jax.Array:
    """The readout of a step that keeps each position's likeliest next token."""
    return jnp.argmax(jaxmoe.unembed(config, params, hidden), axis=-1)


def generate(
    config: jaxmoe.Llama4Config, params: dict, prompt: list[int], max_new_tokens: int
) -> Iterator[list[int]]:
    """The greedy continuation of a prompt on the current mesh; yields each step's tokens."""
    text, stop = list(prompt), len(prompt) + max_new_tokens
    document = new_document(config, params, stop)
    *_, document = [document, *read(config, params, document, text[:-1])]
    cache, chunk = document.cache, config.attention_chunk_size or stop
    while len(text) < stop:
        start = len(text) - 1
        # Local layers forget a chunk when the next begins, so no guess goes beyond its end.
        guessed = guess(text, min(GUESSES, chunk - 1 - start % chunk, stop - len(text) - 1))
        width = 1 + GUESSES if guessed else 1  # two shapes to compile
        order = np.arange(width)[None]
        tokens = np.resize([text[-1], *guessed], (1, width))  # what is too much is padding
        fed = tokens, start + order, order <= len(guessed)
        inputs = Inputs(*(jnp.asarray(x, jnp.int32) for x in fed))
        chosen, cache = step(config, params, inputs, cache, readout=likeliest)
        chosen = np.asarray(chosen)[0].tolist()
        right = next((i for i, x in enumerate(guessed) if x != chosen[i]), len(guessed))
        if right < len(guessed):
            cache = truncate(cache, jnp.array([start + 1 + right]))
        text += chosen[: right + 1]
        yield chosen[: right + 1]
