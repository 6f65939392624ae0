"""How a step's tokens are chosen: the settings of its requests, as arrays for the device.

What no request of a run asks for is not compiled, and a step in which every answer is greedy, with
no other wish, runs a program of its own.

Shape letters: G groups, Q places for tokens of a group, B = G * Q, R rows of a group.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.compilation import KEEP_ROUNDINGS
from jaxmoe.config import Llama4Config
from jaxmoe.generation.completion import Completion
from jaxmoe.generation.counts import Counts, count, counts_of_prompt
from jaxmoe.generation.sampler import Bias, Choice, Chosen, Draws, Penalties, choose
from jaxmoe.generation.sampling import NO_TOKEN, Sampling, request_hash
from jaxmoe.mesh import on_all_devices
from jaxmoe.model.transformer import unembed

ALL = 0xFFFFFFFF  # a mask's word that allows all its tokens
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
NONE = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # what keeps every token


class ReadOut(NamedTuple):
    """Hidden states at the places after which tokens are chosen, and at all tokens of a step."""

    chosen: Float[Array, "B D"]
    all: Float[Array, "L S D"]


class State(NamedTuple):
    """What the device keeps of the answers, by the rows that requests have.

    Attributes:
        previous: the last token of each row; any token of those that had drafts.
        counts: what penalties are about, by rows of all groups; None if no request has any.
    """

    previous: Int[Array, "G R"]
    counts: Counts | None


def start_counts(state: State, number: int, prompt: np.ndarray) -> State:
    """The state with the tokens of a prompt in place of what a row, by its number, had."""
    assert state.counts is not None
    return state._replace(counts=counts_of_prompt(state.counts, number, prompt))


class Writer(NamedTuple):
    """An answer that gets its next token, after so many, of which the last may be drafts."""

    completion: Completion
    written: int
    drafts: tuple[int, ...] = ()

    @property
    def sampling(self) -> Sampling:
        """The settings of the answer."""
        return self.completion.sampling


class Choices:
    """Makes the choice of each step from the settings of its requests.

    Attributes:
        penalized: whether any request has penalties.
        prompt_top: how many log-probabilities of prompts' tokens are asked for, at most.
    """

    def __init__(self, vocab_size: int, end_ids: Sequence[int], drafts: int = 0):
        """No request asks for anything yet.

        Args:
            end_ids: the model's own stop tokens.
            drafts: that a row has in a step, at most.
        """
        self._end_ids, self._words = tuple(end_ids), -(-vocab_size // 32)
        self._drafts = drafts
        self._filters: set[str] = set()
        self.penalized = self._drawn = self._masked = False
        self._biases = self.prompt_top = 0
        self._top: int | None = None

    def add(self, samplings: Iterable[Sampling]) -> None:
        """Takes in what the settings of more requests ask for."""
        for s in samplings:
            self._filters |= {n for n, none in NONE.items() if getattr(s, n) != none}
            self._drawn |= s.temperature > 0
            self.penalized |= has_penalties(s)
            self._masked |= _is_masked(s)
            if biases := len(self._bias(s, 0)):
                self._biases = max(self._biases, 1 << (biases - 1).bit_length())
            self.prompt_top = max(self.prompt_top, s.prompt_logprobs or 0)
            if s.logprobs is not None:
                self._top = max(self._top or 0, s.logprobs)

    def of(self, writers: Sequence[Writer | None]) -> tuple[Choice, int | None]:
        """How a step's tokens are chosen, and how many log-probabilities are told beside theirs.

        Args:
            writers: one for each of its B places; None where there is none.
        """
        if all(w is None or is_greedy(w.sampling) for w in writers):
            return Choice(), None
        return Choice(
            self._draws(writers) if self._drawn else None,
            self._penalties(writers) if self.penalized else None,
            self._biased(writers) if self._biases else None,
            self._allowed(writers) if self._masked else None,
        ), self._top

    def _draws(self, writers: Sequence[Writer | None]) -> Draws:
        def column(name: str, none, dtype):
            return _column(writers, lambda w: getattr(w.sampling, name), none, dtype)

        dtypes = {"top_k": np.int32, "top_p": np.float32, "min_p": np.float32}
        return Draws(
            seed=column("seed", 0, np.int32),
            request=_column(writers, lambda w: request_hash(w.completion.request.id), 0, np.uint32),
            index=_column(writers, lambda w: w.written, 0, np.int32),
            temperature=column("temperature", 0.0, np.float32),
            **{
                name: column(name, NONE[name], dtypes[name])
                for name in NONE
                if name in self._filters
            },
        )

    def _penalties(self, writers: Sequence[Writer | None]) -> Penalties:
        nones = (1.0, 0.0, 0.0)
        columns = (
            _column(writers, lambda w, name=name: getattr(w.sampling, name), none, np.float32)
            for name, none in zip(PENALTIES, nones, strict=True)
        )
        before = self._before(writers) if self._drafts else None
        return Penalties(*columns)._replace(drafts=before)

    def _before(self, writers: Sequence[Writer | None]) -> Any:
        """The drafts that each token comes after."""
        before = np.full((len(writers), self._drafts), NO_TOKEN, np.int32)
        for i, writer in enumerate(writers):
            drafts = writer.drafts if writer else ()
            before[i, : len(drafts)] = drafts
        return before

    def _bias(self, sampling: Sampling, written: int) -> list[tuple[int, float]]:
        """Tokens and what is added to their logits; stop tokens are forbidden before their time."""
        early = written < sampling.min_tokens
        ends = {*sampling.stop_ids, *(() if sampling.ignore_eos else self._end_ids)}
        forbidden = ((token, -np.inf) for token in sorted(ends)) if early else ()
        return [*sampling.logit_bias, *forbidden]

    def _biased(self, writers: Sequence[Writer | None]) -> Bias:
        ids = np.full((len(writers), self._biases), -1, np.int32)
        values = np.zeros(ids.shape, np.float32)
        for i, writer in enumerate(writers):
            pairs = self._bias(writer.sampling, writer.written) if writer else ()
            for j, (token, value) in enumerate(pairs):
                ids[i, j], values[i, j] = token, value
        return Bias(*map(jnp.asarray, (ids, values)))

    def _allowed(self, writers: Sequence[Writer | None]) -> Any:
        allowed = np.full((len(writers), self._words), ALL, np.uint32)
        for i, writer in enumerate(writers):
            if writer is None:
                continue
            if writer.completion.matcher is not None:
                allowed[i] = writer.completion.matcher.mask(writer.drafts).view(np.uint32)
            elif writer.sampling.allowed_ids is not None:
                allowed[i] = _mask(writer.sampling.allowed_ids, self._words)
        return allowed


def has_penalties(sampling: Sampling) -> bool:
    """Whether a request's tokens are counted."""
    return tuple(getattr(sampling, name) for name in PENALTIES) != (1.0, 0.0, 0.0)


def is_greedy(sampling: Sampling) -> bool:
    """Whether the likeliest token is taken, and nothing else is asked for."""
    plain = sampling.temperature == 0 and not has_penalties(sampling)
    plain = plain and not sampling.logit_bias and not sampling.min_tokens
    return plain and not _is_masked(sampling) and sampling.logprobs is None


def _is_masked(sampling: Sampling) -> bool:
    return sampling.grammar is not None or sampling.allowed_ids is not None


@functools.lru_cache(maxsize=64)
def _mask(ids: tuple[int, ...], words: int) -> np.ndarray:
    bits = np.zeros(32 * words, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _column(writers: Sequence[Writer | None], value: Callable, none, dtype) -> Any:
    return np.array([none if w is None else value(w) for w in writers], dtype)


def hidden_at(
    config: Llama4Config,
    params: dict,
    hidden: Float[Array, "L S D"],
    slots: Int[Array, "G Q"],
    states: Float[Array, "L S states"] | None = None,
) -> tuple[ReadOut, ReadOut | None]:
    """The readout of a step that keeps the hidden states at some places, and all of them.

    Taken out in the step's own program, they have one shape for steps of many sizes, for which
    `choose_tokens` is compiled once.

    Args:
        slots: the places, among the tokens of each group.
        states: what a draft head reads, of which the same is kept; None without one.
    """

    def read_out(x) -> ReadOut:
        of_groups = x.reshape(len(slots), -1, x.shape[-1])
        chosen = jnp.take_along_axis(of_groups, slots[:, :, None], axis=1)
        return ReadOut(chosen.reshape(slots.size, -1), x)

    return read_out(hidden), None if states is None else read_out(states)


@functools.partial(
    jax.jit,
    static_argnames=("config", "top"),
    donate_argnames="state",
    compiler_options=KEEP_ROUNDINGS,
)
def choose_tokens(
    config: Llama4Config,
    params: dict,
    hidden: Float[Array, "B D"],
    targets: Int[Array, "G Q"],
    drafts: Int[Array, "G Q"],
    choice: Choice,
    state: State,
    top: int | None,
) -> tuple[Chosen, State]:
    """The next token at some places of a step, and the state with them.

    Args:
        hidden: the decoder's output at these places.
        targets: the row of each; beyond the rows of requests for none.
        drafts: what was written at the place before, if the token at this one counts; `NO_TOKEN`
            where it counts in any case.
        top: as for `choose`.
    """
    groups, rows = state.previous.shape
    group = jnp.arange(groups)[:, None]
    row = jnp.minimum(group * rows + targets, groups * rows - 1).reshape(-1)
    logits = unembed(config, params, hidden)
    chosen = choose(logits, choice, state.counts, row, top=top)
    token = jnp.where(targets.reshape(-1) < rows, chosen.token, NO_TOKEN)
    counts = state.counts
    if counts is not None:
        right = _follows_right(token, drafts.reshape(-1))
        counts = count(counts, row, jnp.where(right, token, NO_TOKEN))
    previous = state.previous.at[group, targets].set(token.reshape(targets.shape), mode="drop")
    return jax.tree.map(on_all_devices, chosen), State(on_all_devices(previous), counts)


def _follows_right(token: Int[Array, "B"], drafts: Int[Array, "B"]) -> Bool[Array, "B"]:
    """Whether all drafts that a token comes after are the tokens written at their places."""
    is_draft = drafts != NO_TOKEN
    wrong = jnp.cumsum(is_draft & (drafts != jnp.roll(token, 1)))
    first = lax.cummax(jnp.where(is_draft, 0, jnp.arange(len(drafts))))
    return wrong == wrong[first]
