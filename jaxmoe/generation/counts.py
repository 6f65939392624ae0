"""What a row's prompt and answer have of each token, which penalties are about.

The counts stay on the devices, each of which has its part of the vocabulary for all rows; where the
mesh does not divide the vocabulary, V here is more than it. The functions return new counts: a
compiled program that is given the old ones to keep (`donate_argnames`) changes them in place.

Shape letters: R rows, V vocabulary, B rows that have new tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int, Int16

from jaxmoe import mesh as meshes
from jaxmoe.generation.vocab import padded_size, this_part

MOST = 2**15 - 1


class Counts(NamedTuple):
    """What each row has had.

    Attributes:
        generated: how often the answer has the token.
        prompt: whether the prompt has it.
    """

    generated: Int16[Array, "R V"]
    prompt: Bool[Array, "R V"]


def new_counts(rows: int, vocab: int) -> Counts:
    """Counts of rows without tokens, on the current mesh."""
    shape = rows, padded_size(vocab)
    arrays = jnp.zeros(shape, jnp.int16), jnp.zeros(shape, bool)
    return Counts(*(meshes.constrain(x, None, "vocab") for x in arrays))


def counts_of_prompt(counts: Counts, row: int, prompt: Sequence[int] | np.ndarray) -> Counts:
    """The counts, which are used up, in which a row has a new prompt and no answer."""
    width = 1 << (len(prompt) - 1).bit_length()  # few widths to compile
    prompt_ids = np.full(max(width, 64), -1, np.int32)
    prompt_ids[: len(prompt)] = prompt
    return _start_counts(counts, np.int32(row), prompt_ids)


def start_counts(counts: Counts, row: Int[Array, ""], prompt_ids: Int[Array, "S"]) -> Counts:
    """Counts in which a row has a new prompt and no answer.

    Args:
        prompt_ids: the prompt, filled up with -1.
    """

    def body(counts, row, prompt_ids):
        index = _index(counts, prompt_ids)
        prompt = counts.prompt.at[row].set(False).at[row, index].set(True, mode="drop")
        return Counts(counts.generated.at[row].set(0), prompt)

    return _per_part(body, counts, row, prompt_ids)


def count(counts: Counts, rows: Int[Array, "B"], tokens: Int[Array, "B"]) -> Counts:
    """Counts in which rows have one more token each.

    Args:
        rows: rows of the counts; a row may come several times.
        tokens: what they have generated; -1 for nothing.
    """

    def body(counts, rows, tokens):
        at = rows, _index(counts, tokens)
        before = counts.generated.at[at].get(mode="fill", fill_value=0)
        one = (before < MOST - len(rows)).astype(jnp.int16)  # stops before int16 does
        return counts._replace(generated=counts.generated.at[at].add(one, mode="drop"))

    return _per_part(body, counts, rows, tokens)


_start_counts = jax.jit(start_counts, donate_argnums=0)


def _index(counts: Counts, tokens):
    here = counts.generated.shape[1]
    return this_part(here, here).local_index(tokens)


def _per_part(body, counts: Counts, *arguments) -> Counts:
    """Runs `body` on each device's part of the counts; all devices have the other arguments."""
    spec, everywhere = meshes.param_spec((None, "vocab")), PartitionSpec()
    specs = (spec, *(everywhere for _ in arguments))
    return meshes.per_device(body, specs, spec)(counts, *arguments)
