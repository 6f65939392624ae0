"""One timed run of requests in the engine."""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxmoe.config import Llama4Config
from jaxmoe.generation.completion import Completion, CompletionToken
from jaxmoe.generation.engine import Engine, Request, Unread


class TimedEngine(Engine):
    """An engine that notes its times.

    Attributes:
        host: for each step, seconds in which the engine's thread was at work: making the step's
            arrays, starting its programs, and reading the tokens of the step before. It is the
            thread's processor time, which stands still while the thread waits for the device or
            for a core; XLA computes steps in threads of its own.
        admitted: when each request was given a row, by its id, as `time.perf_counter` has it.
    """

    def __init__(self, *args, **options):
        self.host: list[float] = []
        self.admitted: dict[object, float] = {}
        self._worked = 0.0
        super().__init__(*args, **options)

    def _enqueue(self) -> Unread | None:
        now, waiting = time.perf_counter(), self._waiting()
        begin = time.thread_time()
        unread = super()._enqueue()
        self._worked += time.thread_time() - begin
        self.admitted |= dict.fromkeys(waiting - self._waiting(), now)
        return unread

    def _read(self, unread: Unread) -> Iterator[CompletionToken]:
        begin = time.thread_time()
        tokens = list(super()._read(unread))  # at once, without the time of who consumes them
        self.host.append(self._worked + time.thread_time() - begin)
        self._worked = 0.0
        yield from tokens

    def _waiting(self) -> set:
        return {request.id for request, _ in self._scheduler.waiting}


class Run(NamedTuple):
    """What was seen in a run.

    Attributes:
        seconds: from before the engine was made until the last token was read.
        answers: tokens by the request's id.
        first_token: seconds from the run's start to each request's first token.
        after_admission: the same from when the request was given a row.
        host: as of `TimedEngine`.
        slots: as of `Engine`, and so are `tokens` and `steps`.
        drafted: drafts that its steps have tried, first, second, ... after a row's last token.
        accepted: of these, how many were right.
    """

    seconds: float
    answers: dict[object, list[int]]
    first_token: list[float]
    after_admission: list[float]
    host: list[float]
    slots: int
    tokens: int
    steps: int
    drafted: list[int]
    accepted: list[int]


def timed_run(
    config: Llama4Config, params: dict, requests: Sequence[Request], rows: int, **options: Any
) -> Run:
    """Runs requests that fit the context, to the last token that each asks for.

    Args:
        options: `step_tokens`, `drafts` and `head` of the engine.
    """
    begin = time.perf_counter()
    engine = TimedEngine(config, params, requests, rows=rows, stop_ids=(), **options)
    answers: dict[object, list[int]] = {request.id: [] for request in requests}
    first: dict[object, float] = {}
    done: list[Completion] = []
    for token in engine.run():
        if token.finish_reason:
            done.append(token.completion)
        first.setdefault(token.request.id, time.perf_counter())
        answers[token.request.id].append(token.token)
    return Run(
        time.perf_counter() - begin,
        answers,
        [seconds - begin for seconds in first.values()],
        [seconds - engine.admitted[id] for id, seconds in first.items()],
        engine.host,
        engine.slots,
        engine.tokens,
        engine.steps,
        _sums(completion.drafted for completion in done),
        _sums(completion.accepted for completion in done),
    )


def _sums(rows: Iterable[list[int]]) -> list[int]:
    return [sum(column) for column in itertools.zip_longest(*rows, fillvalue=0)]
