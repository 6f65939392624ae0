"""Generation: requests in, tokens out, by continuous batching (`jaxmoe.generation.scheduler`)."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation.batches import Batch, Sizes
from jaxmoe.generation.document import Document
from jaxmoe.generation.pool import HOLDERS, free_pages, lay_out, new_cache, widen
from jaxmoe.generation.prefixes import find_prefixes
from jaxmoe.generation.request import ERROR, Request, Token, fit_context
from jaxmoe.generation.rows import Row
from jaxmoe.generation.sampling import NO_TOKEN, Sampling, request_hash, sample
from jaxmoe.generation.scheduler import Scheduler
from jaxmoe.model import transformer
from jaxmoe.model.kv_cache import fork_row
from jaxmoe.model.steps import hidden_states, step
from jaxmoe.model.transformer import unembed

__all__ = ["ERROR", "STEP_TOKENS", "Request", "Token", "fit_context", "generate"]
STEP_TOKENS = 512  # that a step takes, at most
OVERHEAD = {"cpu": 16}  # what a step costs beside its tokens, in tokens, by platform
READING_WEIGHTS = 256  # the same where a step takes as long as reading the weights


def generate(
    config: Llama4Config,
    params: dict,
    requests: Iterable[Request],
    sampling: Sampling,
    *,
    rows: int = 8,
    step_tokens: int = STEP_TOKENS,
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
        step_tokens: tokens that a step takes, of prompts and answers together, at most.
        stop_ids: tokens that end an answer; default: the config's.
        kv: how keys and values are stored: "bf16", "int8", "fp8" or "int4"; default: as parameters.
        cache_tokens: that all rows together can hold; requests wait for room. Default: enough that
            none waits.
        document: a text that each request comes after; its cache is used and used up, and `kv` and
            `cache_tokens` are the document's.
        forward: `jaxmoe.forward`, or a fork's function of the same arguments.

    Raises:
        UserError: for an empty prompt, one that leaves no room in the context, a token that is not
            in the vocabulary, no rows, an unknown `kv`, or a request that the cache cannot hold.
    """
    after = 0 if document is None else document.length
    fitting = [fit_context(config, request, after) for request in requests]
    if rows < 1:
        raise UserError(f"rows {rows} is below 1.")
    if not fitting:
        return iter(())
    return Engine(
        config,
        params,
        fitting,
        sampling,
        rows=rows,
        step_tokens=step_tokens,
        stop_ids=stop_ids,
        kv=kv,
        cache_tokens=cache_tokens,
        document=document,
        forward=forward,
    ).run()


class Engine:
    """Requests in work, and the cache that they share.

    Attributes:
        cache: of all rows.
        slots: tokens that the steps so far have computed, padding included.
        tokens: of these, how many were no padding.
    """

    def __init__(
        self,
        config: Llama4Config,
        params: dict,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        rows: int = 8,
        step_tokens: int = STEP_TOKENS,
        stop_ids: tuple[int, ...] | None = None,
        kv: str | None = None,
        cache_tokens: int | None = None,
        document: Document | None = None,
        forward: Callable = transformer.forward,
    ):
        """Takes one or more requests that fit the context; arguments as for `generate`."""
        self._config, self._params, self._sampling = config, params, sampling
        self._stop_ids = config.eos_token_ids if stop_ids is None else stop_ids
        self._forward = forward
        after = 0 if document is None else document.length
        prefixes = find_prefixes(requests)
        rows = min(rows, 1 << (len(requests) - 1).bit_length())
        layout = lay_out(rows, (document is not None) + HOLDERS * any(prefixes))
        if document is not None:
            _check_room(document, requests)
            self.cache = widen(config, document, layout)
        else:
            dtype = kv or params["embed"].dtype
            self.cache = new_cache(config, dtype, layout, requests, prefixes, cache_tokens)
        overhead = OVERHEAD.get(jax.default_backend(), READING_WEIGHTS)
        self._scheduler = Scheduler(
            free_pages(config, self.cache, layout, after),
            layout.rows,
            layout.holders,
            Sizes(layout.rows, step_tokens, overhead),
            padding=config.pad_token_id % config.vocab_size,
            after=after,
        )
        self._scheduler.add(requests, prefixes)
        self._previous = jnp.zeros((layout.groups, layout.each), jnp.int32)
        self.slots = self.tokens = 0

    def run(self) -> Iterator[Token]:
        """Yields tokens until no request is left.

        A step is enqueued before the tokens of the one before it are read, so that the device does
        not wait for the host. A row that turns out to have stopped costs one token.
        """
        unread: collections.deque[tuple[Batch, jax.Array]] = collections.deque()
        while self._scheduler.busy or unread:
            batch = self._enqueue()
            if batch is not None:
                unread.append(batch)
            if unread and (batch is None or len(unread) > 1):
                yield from self._read(*unread.popleft())

    def _enqueue(self) -> tuple[Batch, jax.Array] | None:
        """Starts the next step; returns the tokens that it will have chosen, [G, Q]."""
        forks, batch = self._scheduler.next_batch()
        for fork in forks:
            self.cache = fork_row(self._config, self.cache, *fork)
        if batch is None:
            return None
        hidden, cache = step(
            self._config,
            self._params,
            batch.inputs,
            self.cache,
            readout=hidden_states,
            restart=batch.restart,
            packing=batch.packing,
            previous=self._previous,
            forward=self._forward,
        )
        assert cache is not None
        self.cache = cache
        request, index = self._of_writers(batch)
        chosen, self._previous = _choose(
            self._config, self._params, hidden, self._sampling, batch.slots, batch.targets,
            request, index, self._previous,
        )  # fmt: skip
        self.slots += batch.inputs.tokens.size
        self.tokens += batch.real
        return batch, chosen

    def _of_writers(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """For each slot the hash of its request, and how many tokens were written before."""
        request, index = np.zeros(batch.slots.shape, np.uint32), np.zeros_like(batch.slots)
        for group, slot, row, written in batch.writers:
            assert row.request is not None
            request[group, slot], index[group, slot] = request_hash(row.request.id), written
        return request, index

    def _read(self, batch: Batch, chosen: jax.Array) -> Iterator[Token]:
        """The tokens of a step that its requests still wanted."""
        tokens = np.asarray(chosen)
        for group, slot, row, written in batch.writers:
            if row.ended:
                continue
            assert row.request is not None
            token = int(tokens[group, slot])
            row.known = written + 1
            reason = self._finish_reason(row, token)
            if reason:
                row.ended = True
                self._scheduler.release(row)
            yield Token(row.request, token, reason)

    def _finish_reason(self, row: Row, token: int) -> str | None:
        if token == NO_TOKEN:
            return ERROR
        if token in self._stop_ids:
            return "stop"
        assert row.request is not None
        return "length" if row.known == row.request.max_new_tokens else None


@functools.partial(jax.jit, static_argnames="config")
def _choose(
    config: Llama4Config,
    params: dict,
    hidden: Float[Array, "L S D"],
    sampling: Sampling,
    slots: Int[Array, "G Q"],
    targets: Int[Array, "G Q"],
    request: UInt[Array, "G Q"],
    index: Int[Array, "G Q"],
    previous: Int[Array, "G R"],
) -> tuple[Int[Array, "G Q"], Int[Array, "G R"]]:
    """The next token at some places of a step, and the last token of each row.

    Args:
        slots: the places, among the tokens of each group.
        targets: the row of each; beyond all rows for none.
        request: as for `sample`.
        index: as for `sample`.
        previous: the last tokens before.
    """
    groups = len(slots)
    hidden = hidden.reshape(groups, -1, hidden.shape[-1])
    chosen_from = jnp.take_along_axis(hidden, slots[:, :, None], axis=1).reshape(slots.size, -1)
    logits = unembed(config, params, chosen_from)
    tokens = sample(sampling, logits, request.reshape(-1), index.reshape(-1)).reshape(slots.shape)
    group = jnp.arange(groups)[:, None]
    return tokens, previous.at[group, targets].set(tokens, mode="drop")


def _check_room(document: Document, requests: Sequence[Request]) -> None:
    longest = max(requests, key=lambda request: request.length)
    if longest.length > document.room:
        raise UserError(
            f"the document's cache has room for {document.room} more tokens, but request "
            f"{longest.id!r} takes {longest.length}; load it with more room, or ask for fewer."
        )
