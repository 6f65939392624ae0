"""Generation: requests in, tokens out, by continuous batching (`jaxmoe.generation.scheduler`)."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation.document import Document, restore, snapshot
from jaxmoe.generation.request import ERROR, Request, Token, fit_context
from jaxmoe.generation.sampling import Sampling, sample
from jaxmoe.generation.scheduler import Scheduler
from jaxmoe.model import transformer
from jaxmoe.model.kv_cache import Cache, init_cache, round_capacity, row_groups
from jaxmoe.model.steps import step
from jaxmoe.model.transformer import unembed

__all__ = ["ERROR", "PREFILL_CHUNK", "Request", "Token", "fit_context", "generate"]
PREFILL_CHUNK = 512  # tokens of a prompt that one step takes, at most


def generate(
    config: Llama4Config,
    params: dict,
    requests: Iterable[Request],
    sampling: Sampling,
    *,
    rows: int = 8,
    prefill_chunk: int = PREFILL_CHUNK,
    stop_ids: tuple[int, ...] | None = None,
    kv: str | None = None,
    cache_tokens: int | None = None,
    document: Document | None = None,
    forward: Callable = transformer.forward,
) -> Iterator[Token]:
    """Runs requests on the current mesh; yields tokens as they come, requests interleaved.

    The requests are checked at once, and run as the result is consumed, under the same mesh.

    Args:
        rows: requests that are in work at once, at most.
        prefill_chunk: prompt tokens that a row takes in one step, at most.
        stop_ids: tokens that end an answer; default: the config's.
        kv: how keys and values are stored: "bf16", "int8", "fp8" or "int4"; default: as parameters.
        cache_tokens: that all rows together can hold; requests wait for room. Default: enough that
            none waits.
        document: a text that each request comes after, one request at a time; its cache is used
            and used up. `rows`, `kv` and `cache_tokens` are then the document's.
        forward: `jaxmoe.forward`, or a fork's function of the same arguments.

    Raises:
        UserError: for an empty prompt, one that leaves no room in the context, a token that is not
            in the vocabulary, no rows, an unknown `kv`, or a request that the cache cannot hold.
    """
    if rows < 1:
        raise UserError(f"rows {rows} is below 1.")
    after = 0 if document is None else document.length
    waiting = [fit_context(config, request, after) for request in requests]
    if not waiting:
        return iter(())
    if document is not None:
        _check_room(document, waiting)
        rows = 1
    else:
        rows = min(rows, len(waiting))
        cache = _new_cache(config, kv or params["embed"].dtype, waiting, rows, cache_tokens)
        document = Document(cache, 0)
    scheduler = Scheduler(
        waiting,
        document.cache,
        rows,
        after=after,
        prefill_chunk=prefill_chunk,
        stop_ids=config.eos_token_ids if stop_ids is None else stop_ids,
        padding=config.pad_token_id % config.vocab_size,
    )
    return _run(config, params, document, scheduler, sampling, forward)


def _run(
    config: Llama4Config,
    params: dict,
    document: Document,
    scheduler: Scheduler,
    sampling: Sampling,
    forward: Callable,
) -> Iterator[Token]:
    """Steps until no request is left; after each answer about a document, restores its cache."""
    cache = document.cache
    several = document.length and len(scheduler.waiting) > 1
    before = snapshot(config, document) if several else None
    while scheduler.busy:
        scheduler.admit()
        batch = scheduler.next_batch()
        chosen, cache = step(
            config,
            params,
            batch.inputs,
            cache,
            readout=sampled,
            arguments=(sampling, batch.last, batch.request, batch.index),
            restart=batch.restart,
            forward=forward,
        )
        for token in scheduler.commit(np.asarray(chosen).tolist()):
            yield token
            if token.finish_reason and before is not None and scheduler.waiting:
                cache = restore(config, cache, before)


def sampled(
    config: Llama4Config,
    params: dict,
    hidden: Float[Array, "B S D"],
    sampling: Sampling,
    last: Int[Array, "B"],
    request: UInt[Array, "B"],
    index: Int[Array, "B"],
) -> Int[Array, "B"]:
    """The readout that chooses each row's next token.

    Args:
        last: index of each row's last real token.
        request: as for `sample`.
        index: as for `sample`.
    """
    last_hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return sample(sampling, unembed(config, params, last_hidden), request, index)


def _check_room(document: Document, requests: Sequence[Request]) -> None:
    longest = max(requests, key=lambda request: request.length)
    if longest.length > document.room:
        raise UserError(
            f"the document's cache has room for {document.room} more tokens, but request "
            f"{longest.id!r} takes {longest.length}; load it with more room, or ask for fewer."
        )


def _new_cache(
    config: Llama4Config, dtype, requests: Sequence[Request], rows: int, tokens: int | None
) -> Cache:
    """An empty cache of so many tokens, by default enough for the longest requests in all rows."""
    lengths = sorted((request.length for request in requests), reverse=True)
    if tokens is not None and tokens < lengths[0]:
        raise UserError(
            f"a cache of {tokens} tokens has no room for a request of {lengths[0]}; use more, or "
            "ask for fewer new tokens."
        )
    groups = row_groups(rows)
    tokens = groups * sum(lengths[: rows // groups]) if tokens is None else tokens
    return init_cache(config, rows, round_capacity(lengths[0]), dtype, tokens=tokens)
