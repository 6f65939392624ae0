"""The compiled step of the model, and chunked prefill: what every caller of `forward` runs.

Generation, documents, evaluation, planning and held-out losses differ in what they keep of a step.
That is its `readout`, a function that is compiled together with the decoder:

    readout(config, params, hidden, *arguments) -> anything

Shape letters: B rows, S tokens a row, D embed, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxmoe.compilation import KEEP_ROUNDINGS
from jaxmoe.config import Llama4Config
from jaxmoe.model import transformer
from jaxmoe.model.kv_cache import Cache, restart_rows
from jaxmoe.model.lora import with_index
from jaxmoe.model.packing import Packing
from jaxmoe.model.transformer import unembed

Readout = Callable[..., Any]
Place = Callable[[np.ndarray], tuple[np.ndarray, Any]]  # tokens to those of a step, and features
PREVIOUS = -1  # in place of a token: the one that its row of the cache has written last


class Inputs(NamedTuple):
    """The new tokens of a step, as `forward` takes them; segment 0 is padding.

    Attributes:
        positions: None where each segment of the inputs begins at 0.
    """

    tokens: Int[Array, "B S"]
    positions: Int[Array, "B S"] | None
    segment_ids: Int[Array, "B S"]


@functools.partial(
    jax.jit,
    static_argnames=("config", "readout", "forward", "states"),
    donate_argnames="cache",
    compiler_options=KEEP_ROUNDINGS,
)
def step(
    config: Llama4Config,
    params: dict,
    inputs: Inputs,
    cache: Cache | None,
    *,
    readout: Readout,
    arguments: tuple = (),
    restart: Int[Array, "rows"] | Bool[Array, "rows"] | None = None,
    packing: Packing | None = None,
    previous: Int[Array, "G R"] | None = None,
    features: Float[Array, "N D"] | None = None,
    adapter: Int[Array, "B S"] | None = None,
    forward: Callable = transformer.forward,
    states: tuple[int, ...] = (),
) -> tuple[Any, Cache | None]:
    """Runs the decoder on new tokens, in one compiled program with what is read out of it.

    It has compiler options, which JAX takes of no program within another: a `jit`, `scan` or `grad`
    around it calls `step.__wrapped__`, and its own `jit` gets `compiler_options=KEEP_ROUNDINGS`.

    Args:
        params: as for `forward`.
        inputs: the new tokens.
        cache: as for `forward`; it is donated, so only the one that is returned is valid.
        readout: a module's function, see above; other functions compile again at every call.
        arguments: arrays that `readout` takes beside the hidden states.
        restart: rows of the cache that are emptied before the new tokens are added.
        packing: as for `forward`.
        previous: the last token that the first rows of each group of the cache's rows have
            written; the one that `PREVIOUS` stands for among the new tokens.
        features: as for `forward`.
        adapter: each token's, of the model's adapters (`jaxmoe.model.lora.LoraSet`) from 1 on; 0
            for none.
        forward: `jaxmoe.forward`, or a fork's function of the same arguments.
        states: as for `forward`; `readout` is given them as its last argument.

    Returns:
        What `readout` returns, and the cache with the new tokens.
    """
    if cache is not None and restart is not None:
        cache = restart_rows(cache, restart)
    tokens, positions, segment_ids = inputs
    if positions is None:
        positions = transformer.positions_of(segment_ids)
    options: dict[str, Any] = {}
    if features is not None:
        options["features"] = features
    if packing is not None:
        options["packing"] = packing
        if previous is not None:
            tokens = _with_previous(tokens, packing.row, previous)
    if states:
        options["states"] = states
    own = params if adapter is None else with_index(params, adapter)
    out = forward(config, own, tokens, positions, segment_ids, cache, **options)
    read = *arguments, *([out.states] if states else [])
    return readout(config, params, out.hidden, *read), out.cache


def _with_previous(tokens: Int[Array, "L S"], row: Int[Array, "L S"], previous) -> jax.Array:
    of_group = row.reshape(len(previous), -1)
    known = jnp.take_along_axis(previous, of_group, axis=1).reshape(tokens.shape)
    return jnp.where(tokens == PREVIOUS, jnp.maximum(known, 0), tokens)


def no_output(config: Llama4Config, params: dict, hidden: Float[Array, "B S D"]) -> None:
    """The readout of a step that only fills the cache."""


def hidden_states(
    config: Llama4Config, params: dict, hidden: Float[Array, "B S D"]
) -> Float[Array, "B S D"]:
    """The readout that keeps every token's hidden state."""
    return hidden


def last_logits(
    config: Llama4Config, params: dict, hidden: Float[Array, "B S D"]
) -> Float[Array, "B V"]:
    """The readout that keeps the logits of each row's last token; padding counts as one."""
    return unembed(config, params, hidden[:, -1])


def without_features(tokens: np.ndarray) -> tuple[np.ndarray, None]:
    """The tokens of a step without images."""
    return tokens, None


class Prefilled(NamedTuple):
    """What is there after a chunk of a prefill.

    Attributes:
        done: tokens of each row that were fed, from the row's first on.
        output: what the readout made of the chunk, whose tokens may be followed by padding.
        cache: with all tokens so far; None without a cache.
    """

    done: int
    output: Any
    cache: Cache | None


def prefill(
    config: Llama4Config,
    params: dict,
    tokens: Integer[np.ndarray, "B S"],
    cache: Cache | None,
    *,
    chunk: int,
    start: int = 0,
    stop: int | None = None,
    boundary: int | None = None,
    positions: Integer[np.ndarray, "B S"] | None = None,
    segment_ids: Integer[np.ndarray, "B S"] | None = None,
    readout: Readout = no_output,
    place: Place = without_features,
    forward: Callable = transformer.forward,
) -> Iterator[Prefilled]:
    """Feeds tokens through the cache, a chunk at a time; compiles one shape of step.

    Args:
        tokens: whole rows, of which those from `start` up to `stop` are fed.
        cache: what holds the tokens before `start`, and is used up; None to feed all in one chunk.
        chunk: tokens of a row that a step takes, at most; the last chunk is padded.
        boundary: a chunk ends at every multiple of this.
        positions: default: each token's index in its row.
        segment_ids: default: one segment.
        readout: what to keep of each step.
        place: makes of the tokens of a chunk those of the step, and the features that they name;
            of a whole row with images, since not all their features have to be there at once.
        forward: as for `step`.

    Yields:
        What is there after each chunk.
    """
    stop = tokens.shape[1] if stop is None else stop
    width = chunk_width(chunk, tokens.shape[1])
    while start < stop:
        end = min(start + width, stop)
        if boundary is not None:
            end = min(end, (start // boundary + 1) * boundary)
        new, *where = _cut(tokens, positions, segment_ids, start, end, width)
        new, features = place(new)
        inputs = Inputs(*map(jnp.asarray, (new, *where)))
        output, cache = step(
            config, params, inputs, cache, readout=readout, features=features, forward=forward
        )
        start = end
        yield Prefilled(end, output, cache)


def chunk_width(chunk: int, longest: int) -> int:
    """Tokens a row of a prefill's steps: a power of 2 for short rows, so that few are compiled."""
    return min(chunk, 1 << (max(longest, 1) - 1).bit_length())


def _cut(tokens, positions, segment_ids, start: int, end: int, width: int) -> tuple:
    """`Inputs` in NumPy of the tokens from `start` up to `end` of each row, padded to `width`."""
    index = np.broadcast_to(np.arange(start, start + width, dtype=np.int32), (len(tokens), width))

    def cut(x, default):
        if x is None:
            return default
        part = np.asarray(x[:, start:end], np.int32)
        return np.pad(part, ((0, 0), (0, width - part.shape[1])))

    one_segment = (index < end).astype(np.int32)
    return cut(tokens, None), cut(positions, index), cut(segment_ids, one_segment)
