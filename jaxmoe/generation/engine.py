"""Generation: requests in, tokens out, by continuous batching (`jaxmoe.generation.scheduler`)."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.heads import Head
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation.batches import STEP_TOKENS, Batch, sizes_for
from jaxmoe.generation.choices import (
    Choices,
    State,
    Writer,
    choose_tokens,
    has_penalties,
    hidden_at,
    start_counts,
)
from jaxmoe.generation.completion import Completion, CompletionToken
from jaxmoe.generation.counts import new_counts
from jaxmoe.generation.document import Document, check_adapters
from jaxmoe.generation.drafts import Drafter, PromptLookup, drafts_for
from jaxmoe.generation.features import FeatureTable, References, without_references
from jaxmoe.generation.grammar import GrammarCompiler
from jaxmoe.generation.head_drafts import HeadDrafts
from jaxmoe.generation.pool import HOLDERS, free_pages, lay_out, layout_of, new_cache, widen
from jaxmoe.generation.prefixes import find_prefixes
from jaxmoe.generation.request import ERROR, Request, Token, check_room, fit_context, given_sampling
from jaxmoe.generation.rows import Row
from jaxmoe.generation.sampler import Chosen
from jaxmoe.generation.sampling import NO_TOKEN, Sampling
from jaxmoe.generation.scheduler import Scheduler
from jaxmoe.generation.step_results import Unread, logprobs_of, push_scores, score
from jaxmoe.model import transformer
from jaxmoe.model.adapters import adapter_names, one_adapter
from jaxmoe.model.kv_cache import capacity_of, fork_row
from jaxmoe.model.steps import step
from jaxmoe.text import Tokenizer

__all__ = ["ERROR", "STEP_TOKENS", "Request", "Token", "fit_context", "generate"]


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
    tokenizer: Tokenizer | None = None,
    features: FeatureTable | None = None,
    drafts: int | None = None,
    head: Head | None = None,
    forward: Callable = transformer.forward,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[CompletionToken]:
    """Runs requests on the current mesh; yields tokens as they come, requests interleaved.

    The requests are checked at once, and run as the result is consumed, under the same mesh.

    Args:
        sampling: of requests that bring none.
        rows: requests that are in work at once, at most.
        step_tokens: tokens that a step takes, of prompts and answers together, at most; on a mesh
            that divides rows into groups, those of each group. Twice the rows, if that is more.
        stop_ids: tokens that end an answer; default: the config's.
        kv: how keys and values are stored: "bf16", "int8", "fp8" or "int4"; default: as parameters.
        cache_tokens: that all rows together can hold, in equal parts for groups of rows on a mesh,
            each with room for the longest request at least; requests wait for room. Default: enough
            that none waits.
        document: a text that each request comes after; its cache is used and used up, and `kv` and
            `cache_tokens` are the document's, as is the adapter of every request.
        tokenizer: makes text of the answers; needed for stop strings and grammars.
        features: of images that were computed before; default: an empty table.
        drafts: tokens that a row tries beside its last one in a step, at most, if they followed the
            same text before or a head guesses them (`jaxmoe.generation.drafts`); the answers are
            the same, as with other `rows`: in bfloat16 but for rounding. 0 for none; default: 3
            with a head; without, 7 on CPUs as far as steps stay as large as `rows` makes them.
        head: an EAGLE-3 head of this model on the same mesh (`jaxmoe.checkpoint.heads`).
        forward: `jaxmoe.forward`, or a fork's function of the same arguments.
        stop: asked once before each step whether to end early, with requests unanswered; on several
            processes it says the same on all.

    Raises:
        UserError: for an empty prompt, one that leaves no room in the context, a token beyond the
            vocabulary, no rows, an unknown `kv`, a request that the cache cannot hold, an adapter
            that the model or the document has not, stop strings or a grammar without a tokenizer,
            or a head where there are no drafts.
    """
    after = 0 if document is None else document.length
    own = (dataclasses.replace(r, sampling=r.sampling or sampling) for r in requests)
    fitting = [fit_context(config, request, after) for request in own]
    if rows < 1:
        raise UserError(f"rows {rows} is below 1.")
    if not fitting:
        return iter(())
    return Engine(
        config,
        params,
        fitting,
        rows=rows,
        step_tokens=step_tokens,
        stop_ids=stop_ids,
        kv=kv,
        cache_tokens=cache_tokens,
        document=document,
        tokenizer=tokenizer,
        features=features,
        drafts=drafts,
        head=head,
        forward=forward,
    ).run(stop)


class Engine:
    """Requests in work, and the cache that they share.

    Attributes:
        cache: of all rows.
        slots: tokens that the steps so far have computed, padding included.
        tokens: of these, how many were no padding.
        steps: how many there were.
        head: its head beside it; None without one.
    """

    def __init__(
        self,
        config: Llama4Config,
        params: dict,
        requests: Sequence[Request],
        *,
        rows: int = 8,
        step_tokens: int = STEP_TOKENS,
        stop_ids: tuple[int, ...] | None = None,
        kv: str | None = None,
        cache_tokens: int | None = None,
        document: Document | None = None,
        tokenizer: Tokenizer | None = None,
        features: FeatureTable | None = None,
        drafts: int | None = None,
        head: Head | None = None,
        forward: Callable = transformer.forward,
        grows: bool = False,
    ):
        """Takes one or more requests that fit the context and have their sampling.

        Args (others are as for `generate`):
            grows: whether more requests are to come, by `add`.
        """
        self._config = config
        self._stop_ids = tuple(config.eos_token_ids if stop_ids is None else stop_ids)
        self._tokenizer, self._forward, self._features = tokenizer, forward, features
        self._references: References | None = None
        platform, asked = jax.default_backend(), drafts or 0
        drafts = drafts_for(config, platform, drafts, head is not None)
        self._choices = Choices(config.vocab_size, self._stop_ids, drafts)
        self._completions: dict[Row, Completion] = {}
        self._every, self._adapters, self._document = params, adapter_names(params), document
        self._chooses = False
        requests = self._prepare(requests)
        prefixes = find_prefixes(requests)
        after = 0 if document is None else document.length
        if document is not None:  # a large cache, beside which no ring is had in vain
            layout = lay_out(rows if len(requests) > 1 else 1, 1 + HOLDERS * any(prefixes))
            longest = max(requests, key=lambda request: request.length)
            check_room(longest, document.room, "the document's cache")
            self.cache = widen(config, document, layout)
        else:
            layout = lay_out(rows, HOLDERS) if grows else layout_of(config, rows, requests)
            dtype = kv or params["embed"].dtype
            self.cache = new_cache(config, dtype, layout, requests, prefixes, cache_tokens)
        sizes = sizes_for(config, platform, layout.rows, step_tokens, drafts if head else asked)
        self.head = None
        if head is not None and drafts:
            room = capacity_of(self.cache) - after, max(sizes.packed, default=1)
            self.head = HeadDrafts(config, params, head, layout, *room, drafts)
        self._sizes, source = sizes.single, self.head or PromptLookup(drafts)
        drafter = Drafter(config, drafts, sizes, after, self._allowed, source) if drafts else None
        self._scheduler = Scheduler(
            free_pages(config, self.cache, layout, after),
            layout.rows,
            layout.holders,
            sizes,
            padding=config.pad_token_id % config.vocab_size,
            after=after,
            adapters=self._adapters,
            drafter=drafter,
        )
        self._scheduler.add(requests, prefixes)
        self._state = State(jnp.zeros((layout.groups, layout.rows), jnp.int32), None)
        self._widen_state()
        self.slots = self.tokens = self.steps = 0

    def _prepare(self, requests: Sequence[Request]) -> Sequence[Request]:
        """The requests as the scheduler takes them; refuses what cannot be served."""
        if self._references is None and any(request.pictures for request in requests):
            table = self._features or FeatureTable(self._config, self._every)
            self._references = References(self._config, table, keeps_lost=True)
        if self._references is not None:
            requests = [self._with_references(request) for request in requests]
        own = {id(request.sampling): request for request in requests}.values()  # hashes are slow
        self._choices.add({given_sampling(request) for request in own})
        for request in own:
            self._completion(request)
        check_adapters(requests, self._adapters, self._document)
        self._chooses = self._chooses or any(request.adapter for request in requests)
        self._params = self._every if self._chooses else one_adapter(self._every, None)
        return requests

    def _widen_state(self) -> None:
        """Makes room for what penalties are about, once a request has any."""
        groups, rows = self._state.previous.shape
        if self._choices.penalized and self._state.counts is None:
            counts = new_counts(groups * rows, self._config.vocab_size)
            self._state = self._state._replace(counts=counts)

    def fits(self, request: Request) -> bool:
        """Whether the cache can hold the request."""
        after = 0 if self._document is None else self._document.length
        room = after + request.length <= capacity_of(self.cache)
        return room and self._scheduler.can_hold(request)

    def add(self, requests: Sequence[Request]) -> None:
        """Takes more requests, which the cache can hold (`fits`).

        Raises:
            UserError: as `generate`.
        """
        requests = self._prepare(requests)
        self._widen_state()
        self._scheduler.add(requests, find_prefixes(requests, self._scheduler.prefixes))

    def _with_references(self, request: Request) -> Request:
        assert self._references is not None
        what = f"request {request.id!r}"
        tokens = self._references.of(what, request.tokens, request.pictures)
        return dataclasses.replace(request, tokens=tuple(tokens.tolist()))

    def run(
        self,
        stop: Callable[[], bool] = lambda: False,
        more: Callable[[], Sequence[Request]] = lambda: (),
    ) -> Iterator[CompletionToken]:
        """Yields tokens until no request is left, or `stop` says to end.

        A step is enqueued before the tokens of the one before it are read, so that the devices do
        not wait for the host. A row that turns out to have stopped costs one token. With drafts the
        tokens are read first.

        Args:
            stop: asked once before each step.
            more: requests to `add`; asked before each step in which fewer wait than there are rows.
        """
        unread: collections.deque[Unread] = collections.deque()
        while not stop():
            if len(self._scheduler.waiting) < self._state.previous.size and (new := more()):
                self.add(new)
            if not self._scheduler.busy and not unread:
                return
            if unread and (unread[-1].batch.has_drafts or self._scheduler.wants_tokens()):
                yield from self._read(unread.popleft())
            step = self._enqueue()
            if step is not None:
                unread.append(step)
            if unread and (step is None or len(unread) > 1):
                yield from self._read(unread.popleft())

    def _enqueue(self) -> Unread | None:
        """Starts the next step; None if rows wait until tokens are read."""
        forks, batch = self._scheduler.next_batch()
        for fork in forks:
            self.cache = fork_row(self._config, self.cache, *fork)
            if self.head is not None:
                self.head.fork(fork.source, fork.target)
        if batch is None:
            return None
        head = self.head
        guesses = head is not None and self._scheduler.wants_guesses(batch)
        inputs, features = batch.inputs, None
        if self._references is not None:
            in_numpy: Any = inputs.tokens
            placed: tuple[Any, Any] = self._references.place(in_numpy)
            inputs, features = inputs._replace(tokens=placed[0]), placed[1]
        (hidden, states), cache = step(
            self._config,
            self._params,
            inputs,
            self.cache,
            readout=hidden_at,
            arguments=(batch.slots,),
            restart=batch.restart,
            packing=batch.packing,
            previous=self._state.previous,
            features=features,
            adapter=batch.adapter if self._chooses else None,
            forward=self._forward,
            states=head.layer_ids if head and guesses else (),
        )
        assert cache is not None
        self.cache = cache
        chosen = self._choose(batch, hidden.chosen) if batch.writers else None
        guesses = head.follow(batch, states, chosen, self._sizes) if head else None
        self.steps, self.slots = self.steps + 1, self.slots + batch.inputs.tokens.size
        self.tokens += batch.real
        about = self._config, self._params, self._choices.prompt_top, self._completion_of
        return Unread(batch, chosen, guesses, *score(*about, batch, hidden.all))

    def _choose(self, batch: Batch, hidden: jax.Array) -> Chosen:
        """Starts to choose the next tokens of a step."""
        groups, most = batch.slots.shape
        writers: list[Writer | None] = [None] * (groups * most)
        for group, slot, row, written in batch.writers:
            before = row.drafts[: written - row.written + 1]
            writer = Writer(self._completion_of(row), written, before)
            writers[group * most + slot] = writer
            if written == 0 and has_penalties(writer.sampling):
                number = group * self._state.previous.shape[1] + int(batch.targets[group, slot])
                prompt = without_references(self._config, row.tokens)
                self._state = start_counts(self._state, number, prompt)
        choice, top = self._choices.of(writers)
        chosen, self._state = choose_tokens(
            self._config,
            self._params,
            hidden,
            batch.targets,
            batch.drafts,
            choice,
            self._state,
            top,
        )
        return chosen

    def _read(self, unread: Unread) -> Iterator[CompletionToken]:
        """The tokens of a step that its requests still wanted."""
        chosen = jax.tree.map(np.asarray, unread.chosen)
        push_scores(unread)
        most, place = unread.batch.slots.shape[1], -1
        for group, slot, row, written in unread.batch.writers:
            completion = self._completions.get(row)
            if completion is None:
                continue  # it has ended, and this token was in vain
            draft, i = int(unread.batch.drafts[group, slot]), group * most + slot
            place = place + 1 if draft != NO_TOKEN else -1
            right = written == row.known and draft in (NO_TOKEN, chosen.token[i - 1])
            completion.count_draft(place, right)
            if not right:
                continue  # it comes after a draft that is refused
            row.seen(int(chosen.token[i]), written)
            if self.head is not None:
                self.head.seen(row, int(chosen.token[i]), unread.guesses, draft != NO_TOKEN)
            if self._references is not None:
                completion.failure = self._references.lost(completion.request.pictures)
            text = completion.push(int(chosen.token[i]), *logprobs_of(chosen, i))
            if completion.finish_reason is not None:
                self._scheduler.release(row)
                del self._completions[row]
                if self._references is not None:
                    self._references.release(completion.request.pictures)
            yield CompletionToken(completion, int(chosen.token[i]), text)
        if self.head is not None and unread.guesses is not None:
            self.head.take(unread.guesses)

    def _allowed(self, row: Row, drafts: Sequence[int]) -> int:
        """How many drafts of a row its grammar takes."""
        matcher = self._completion_of(row).matcher
        return len(drafts) if matcher is None else matcher.allowed(drafts)

    def _completion_of(self, row: Row) -> Completion:
        assert row.request is not None
        if row not in self._completions:
            self._completions[row] = self._completion(row.request)
        return self._completions[row]

    def _completion(self, request: Request) -> Completion:
        sampling = given_sampling(request)
        if self._references is not None:
            tokens = without_references(self._config, request.tokens).tolist()
            request = dataclasses.replace(request, tokens=tuple(tokens))
        matcher = self._grammars.matcher(sampling.grammar) if sampling.grammar else None
        return Completion(request, sampling, self._stop_ids, self._tokenizer, matcher)

    @functools.cached_property
    def _grammars(self) -> GrammarCompiler:
        if self._tokenizer is None:
            raise UserError("a request has a grammar, but there is no tokenizer; leave it out.")
        return GrammarCompiler(self._tokenizer, self._config.vocab_size, self._stop_ids)
