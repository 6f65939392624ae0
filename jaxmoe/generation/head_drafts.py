"""Drafts by an EAGLE-3 head (`jaxmoe.model.eagle`) for the rows of the engine.

The head follows what the target reads and writes. Its pass at a token's place needs the target's
hidden states there and the token after it, so it is one place behind: with each token that a row
is fed, it passes over the place before. After a step's tokens are chosen it passes over their
places and guesses on, from the last one that counts.

Its cache has one sequence a row, which leaves out what the head was not given: a document, and
tokens of steps in which no draft was worth while. Guesses get worse by that, answers do not. A
sequence that reaches the end of its cache begins anew.

Shape letters: R rows of the cache, T tokens of a step, W of a piece of a prompt, B places at which
tokens are chosen, A answers that get one, N guesses, D embed.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmoe.checkpoint.heads import Head
from jaxmoe.config import Llama4Config
from jaxmoe.eagle_config import STATES, EagleConfig
from jaxmoe.generation.batches import Batch
from jaxmoe.generation.drafts import places_of_row
from jaxmoe.generation.features import without_references
from jaxmoe.generation.pool import Layout
from jaxmoe.generation.rows import Row
from jaxmoe.generation.sampler import Chosen
from jaxmoe.mesh import on_all_devices
from jaxmoe.model.eagle import DraftCache, eagle_pass, fuse_states, init_draft_cache
from jaxmoe.model.eagle_unroll import draft_chain
from jaxmoe.model.embedding import embed

GUESS = 3.0  # what one costs, in layers of the target: each waits for the one before it
UNKNOWN, RATE = 0.75, 0.02  # share of guesses that are right: at first, and how fast it follows
DRIFT = 0.002  # the same while nothing is guessed, back to what it was at first
LOW, ENOUGH = 0.1, 200  # share of first guesses, of so many, below which something is wrong


class Memory(NamedTuple):
    """What a head keeps of the engine's rows.

    Attributes:
        cache: keys and values of its passes.
        last: the target's hidden states of the last token of each prompt or prefix.
    """

    cache: DraftCache
    last: Float[Array, "R states"]


class Guesses(NamedTuple):
    """The tokens [A, N] that a head guesses after a step's, and whose they are."""

    tokens: Any
    rows: list[Row]


class HeadDrafts:
    """A head beside an engine, and how well it guesses.

    Attributes:
        count: tokens that it guesses after each.
        judged, right: of the guesses at each place of a chain that followed right ones, how many
            there were, and how many were right.
        cost: what a chain costs, as a share of a step.
    """

    def __init__(
        self,
        target: Llama4Config,
        params: dict,
        head: Head,
        layout: Layout,
        tokens: int,
        step_tokens: int,
        count: int,
    ):
        """Begins with nothing read.

        Args:
            target: the target's config.
            params: the target's.
            head: on the same mesh.
            layout: the rows of the target's cache.
            tokens: of a row, at most.
            step_tokens: of a row in one step, at most.
            count: tokens to guess, 1 or more.
        """
        self._target, self._table, self._head = target, params["embed"], head
        self._each, self.count = layout.each, count
        self._places = places_of_row(tokens, step_tokens, count)
        dtype = head.params["fc"].dtype
        self._memory = _no_memory(head.config, layout.total, self._places, dtype)
        self.judged, self.right = [0] * count, [0] * count
        self._rates = [UNKNOWN] * count
        self.cost = GUESS * count / target.num_hidden_layers
        self._warned = False

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The layers of the target whose inputs the head reads."""
        return self._head.config.layer_ids

    # What drafts are given by

    def drafts(self, row: Row, count: int) -> tuple[int, ...]:
        """The guesses after the row's last token that is known."""
        return row.guesses[:count]

    def expected(self, row: Row, count: int) -> int:
        """How many guesses there are once the last token is known."""
        return min(count, self.count)

    def chances(self, row: Row) -> Sequence[float]:
        """How likely it is, for each number of drafts from 1 on, that all are right."""
        return np.cumprod(self._rates).tolist()

    def rest(self) -> None:
        """Counts a step in which nothing is guessed: what was known of guesses is less sure."""
        self._rates = [rate + DRIFT * (UNKNOWN - rate) for rate in self._rates]

    def take(self, guesses: Guesses) -> None:
        """Takes what was guessed after a step's tokens, all of which are `seen`."""
        for row, found in zip(guesses.rows, np.asarray(guesses.tokens), strict=False):
            row.guesses = tuple(found.tolist())
        self._warn_if_bad()

    def seen(self, row: Row, token: int, guesses: Guesses | None, after_draft: bool) -> None:
        """Judges the guess at a token of an answer that is known now.

        Args:
            guesses: those after the step that wrote the token, if there are any.
            after_draft: whether the token came after a draft, which was right.
        """
        row.head_places += after_draft and guesses is not None
        if not row.guesses:
            return
        guess, *others = row.guesses
        place, right = self.count - len(row.guesses), guess == token
        self._rates[place] += RATE * (right - self._rates[place])
        self.judged[place] += 1
        self.right[place] += right
        row.guesses = tuple(others) if right else ()

    def _warn_if_bad(self) -> None:
        """Warns once if hardly a first guess is right."""
        judged, right = self.judged[0], self.right[0]
        if self._warned or judged < ENOUGH or right >= LOW * judged:
            return
        self._warned = True
        layers = ",".join(map(str, self.layer_ids))
        warnings.warn(
            f"of the head's first guesses {right / judged:.1%} are right, with the inputs of "
            f"layers {layers}: it may be the head of another model or read the wrong layers, "
            "which jaxmoe evaluate drafts tells",
            stacklevel=2,
        )

    # What runs on the devices

    def fork(self, source: int, target: int) -> None:
        """Lets a row go on from where another has come to."""
        self._memory = _fork(self._memory, source, target)

    def follow(
        self, batch: Batch, states: Any, chosen: Chosen | None, sizes: Sequence[int]
    ) -> Guesses | None:
        """Passes over what a step has read and written, and starts to guess what comes next.

        Args:
            states: the target's, as `hidden_at` reads them out; None to leave the step out.
            chosen: the step's tokens; None if there are none.
            sizes: that numbers of answers come in, ascending.
        """
        if states is None:
            for row, *_ in batch.read:
                row.head_linked = False
            return None
        if batch.read:
            self._read(batch, states.all)
        return None if chosen is None else self._guess(batch, chosen, states.chosen, sizes)

    def _read(self, batch: Batch, states: Float[Array, "L S states"]) -> None:
        """Passes over the tokens of prompts that a step feeds."""
        flat = states.reshape(-1, states.shape[-1])
        of_group = batch.inputs.tokens.size // len(batch.slots)
        place_of = np.asarray(batch.packing.row).reshape(-1)
        for row, start, first, count in batch.read:
            self._make_room(row, count)
            tokens = without_references(self._target, row.tokens[first : first + count])
            width = 1 << (count - 1).bit_length()
            number = start // of_group * self._each + int(place_of[start])
            numbers = start, count, number, row.head_places, int(row.head_linked)
            self._memory = _pass_over(
                self._head.config,
                self._head.params,
                self._table,
                self._memory,
                np.pad(tokens, (0, width - count)).astype(np.int32),
                flat,
                np.array(numbers, np.int32),
            )
            row.head_places += count - 1 + row.head_linked
            row.head_linked = True

    def _make_room(self, row: Row, tokens: int) -> None:
        """Lets the head's sequence of a row begin anew if it has no room for more."""
        if row.head_places + tokens + self.count > self._places:
            row.head_places, row.head_linked = 0, False

    def _guess(
        self, batch: Batch, chosen: Chosen, states: Float[Array, "B states"], sizes: Sequence[int]
    ) -> Guesses | None:
        """Starts to guess what follows a step's tokens."""
        most = batch.slots.shape[1]
        places: dict[Row, list[int]] = {}
        number: dict[Row, int] = {}
        for group, slot, row, _ in batch.writers:
            if not row.complete:
                places.setdefault(row, []).append(group * most + slot)
                number[row] = group * self._each + int(batch.targets[group, slot])
        if not places:
            return None
        width = 1 + self.count if any(len(x) > 1 for x in places.values()) else 1
        size = next((x for x in sizes if x >= len(places)), len(places))
        slots, columns = np.zeros((size, width), np.int32), np.zeros((3, size), np.int32)
        columns[2] = self._memory.cache.places
        for i, (row, own) in enumerate(places.items()):
            self._make_room(row, width)
            slots[i, : len(own)] = own
            columns[:, i] = number[row], len(own), row.head_places
            row.head_places += 1
        tokens, self._memory = _guess_on(
            self._head.config,
            self._head.params,
            self._table,
            self._head.token_ids,
            self._memory,
            chosen.token,
            batch.drafts.reshape(-1),
            states,
            slots,
            columns,
            self.count,
        )
        return Guesses(tokens, list(places))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _no_memory(config: EagleConfig, rows: int, places: int, dtype: Any) -> Memory:
    last = jnp.zeros((rows, STATES * config.hidden_size), dtype)
    return Memory(init_draft_cache(config, rows, places, dtype), on_all_devices(last))


@functools.partial(jax.jit, donate_argnames="memory")
def _fork(memory: Memory, source: Int[Array, ""], target: Int[Array, ""]) -> Memory:
    return jax.tree.map(lambda x: x.at[target].set(x[source]), memory)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="memory")
def _pass_over(
    config: EagleConfig,
    params: dict,
    table: Float[Array, "V D"],
    memory: Memory,
    tokens: Int[Array, "W"],
    states: Float[Array, "T states"],
    numbers: Int[Array, "5"],
) -> Memory:
    """Passes over the places before each of a row's new tokens.

    Args:
        tokens: those that the row is fed, and padding.
        states: of the step's tokens.
        numbers: where the row's begin among these, how many there are, the row, the first free
            place of its sequence, and whether the place before the first token is passed over too.
    """
    start, count, row, place, linked = numbers
    index = jnp.arange(len(tokens))
    before = jnp.take(states, start - 1 + index, axis=0, mode="clip")
    before = jnp.where(index[:, None] == 0, memory.last[row], before.astype(memory.last.dtype))
    real = (index < count) & (index + linked > 0)
    hidden = fuse_states(config, params, before[None])
    embedded = embed(table, tokens[None])
    positions = (place - 1 + linked + index)[None]
    out = eagle_pass(
        config, params, embedded, hidden, positions, real[None].astype(jnp.int32), memory.cache,
        row[None],
    )  # fmt: skip
    last = jnp.take(states, start + count - 1, axis=0).astype(memory.last.dtype)
    assert out.cache is not None
    return Memory(out.cache, memory.last.at[row].set(last))


@functools.partial(jax.jit, static_argnames=("config", "count"), donate_argnames="memory")
def _guess_on(
    config: EagleConfig,
    params: dict,
    table: Float[Array, "V D"],
    token_ids: Int[Array, "G"],
    memory: Memory,
    chosen: Int[Array, "B"],
    drafts: Int[Array, "B"],
    states: Float[Array, "B states"],
    slots: Int[Array, "A places"],
    columns: Int[Array, "3 A"],
    count: int,
) -> tuple[Int[Array, "A N"], Memory]:
    """Guesses what follows the tokens of answers.

    Args:
        chosen: the tokens.
        drafts: what was given to the step at the place before each; any at the first of an answer.
        states: of the target, at the places after which the tokens were chosen.
        slots: the places of each answer, one after the other.
        columns: of each answer its row of the cache, how many places it has, 0 for none, and the
            first free place of its sequence.
    """
    rows, given, place = columns
    tokens, index = chosen[slots], jnp.arange(slots.shape[1])
    right = (index == 0) | (drafts[slots] == jnp.roll(tokens, 1, axis=1))
    real = lax.cummin((right & (index < given[:, None])).astype(jnp.int32), axis=1)
    chain = draft_chain(
        config, params, table, token_ids, tokens, states[slots],
        place[:, None] + index, real, memory.cache, count, rows,
    )  # fmt: skip
    return on_all_devices(chain.tokens), memory._replace(cache=chain.cache)
