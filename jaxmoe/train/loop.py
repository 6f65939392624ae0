"""The steps of a run, begun before the one before is known to be good."""

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmoe.train import metrics
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.metrics import Meter, Record
from jaxmoe.train.optimizer import learning_rate
from jaxmoe.train.state import TrainState
from jaxmoe.train.step import TARGETS, Outcome

Batches = Callable[[int], Any]
Evaluate = Callable[[dict], Record]
NOT_FINITE = "the loss or its gradient"


class Taken(NamedTuple):
    """A step that was taken, or begun.

    Attributes:
        done: how many steps there are with this one.
        state: the state after it, or the last good one.
        record: of the step; empty where none is due.
        is_due: whether the device was waited for, so that the state is known to be good.
        stopped: whether the run is to end early, with this state.
        not_finite: what ends the run since it is not finite; None if nothing does.
    """

    done: int
    state: TrainState
    record: Record
    is_due: bool = False
    stopped: bool = False
    not_finite: str | None = None


@dataclasses.dataclass(frozen=True)
class Loop:
    """What the steps of a run are made with.

    Attributes:
        config: the run.
        step: (state, batch) -> (state, outcome), as `make_step` returns it.
        batches: the batch of a number.
        meter: counts what is in the records.
        stop: whether to end the run after this step; all processes are told the same.
        evaluate: of the trained parameters, what the records are to hold beside the losses.
    """

    config: TrainConfig
    step: Callable[..., tuple[TrainState, Outcome]]
    batches: Batches
    meter: Meter
    stop: Callable[[], bool]
    evaluate: Evaluate

    def steps(self, state: TrainState) -> Iterator[Taken]:
        """Takes the steps from a state on.

        The host looks at a step once the next one is begun, so that the device does not wait for
        it; where something is due after a step, it looks at once. A step that follows one which
        ends the run changes nothing.
        """
        unseen: collections.deque[Outcome] = collections.deque()
        self.meter.restart()
        for number in range(int(state.step), self.config.steps):
            batch = self._batch(number)
            state, outcome = self.step(state, batch)
            self.meter.count_step(batch)
            unseen.append(outcome)
            done = number + 1
            stopped = self.stop() and done < self.config.steps
            due = stopped or self._is_due(done)
            if self._look(unseen, 0 if due else 1):
                yield Taken(int(state.step) + 1, state, {}, True, not_finite=NOT_FINITE)
                return
            record = self._record(done, outcome, state) if due else {}
            bad = metrics.not_finite(record)
            yield Taken(done, state, {} if bad else record, due, stopped, bad)

    def _batch(self, number: int) -> Any:
        """A step's batch, or several with their arrays stacked."""
        count = self.config.accumulate
        if count == 1:
            return self.batches(number)
        parts = [self.batches(number * count + i) for i in range(count)]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *parts)

    def _is_due(self, done: int) -> bool:
        periods = self.config.log_every, self.config.evaluate_every, self.config.save_every
        return done == self.config.steps or any(every(period, done) for period in periods)

    def _look(self, unseen: collections.deque[Outcome], left: int) -> bool:
        """Waits for steps until so many are unseen; whether one of them ends the run."""
        halted = False
        while len(unseen) > left:
            outcome = unseen.popleft()
            self.meter.count_targets(float(outcome.targets))
            halted |= bool(outcome.halted)
        return halted

    def _record(self, done: int, outcome: Outcome, state: TrainState) -> Record:
        config, record = self.config, {}
        if every(config.log_every, done) or done == config.steps:
            found, norm, skipped = jax.device_get((outcome.metrics, outcome.norm, outcome.skipped))
            rate: Any = learning_rate(config.optimizer, config.steps)(done - 1 - int(skipped))
            record = metrics.record_of(done, found, float(norm), float(rate))
            if config.not_finite == "skip":
                record = metrics.without_not_finite(record) | {"skipped": int(skipped)}
            record |= self.meter.speed(TARGETS in found)
        if every(config.evaluate_every, done) or done == config.steps:
            record |= {"step": done} | self.evaluate(state.params)
        if record:
            self.meter.restart()
        return record


def every(period: int, step: int) -> bool:
    """Whether a step is one of those that come every so many; none does if the period is 0."""
    return period > 0 and step % period == 0
