"""Records of a run: what the loss says, and how fast the steps are."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxmoe.config import Llama4Config
from jaxmoe.plan.model_flops import model_flops
from jaxmoe.plan.targets import peak_flops
from jaxmoe.train.loss import targets_of
from jaxmoe.train.partition import Trainable

Record = dict[str, Any]
HELD_OUT_LOSS = "held_out_loss"  # of a record: what `best` is the least of


def record_of(step: int, metrics: dict, norm: float, rate: float) -> Record:
    """The record of a step in plain numbers, its losses first; none of sources without targets."""
    plain = {
        name: _plain(np.asarray(value))
        for name, value in metrics.items()
        if not name.startswith("loss/") or targets_of(name, metrics)
    }
    record = {"step": step} | {name: plain[name] for name in plain if name.endswith("loss")}
    return record | {"gradient_norm": norm, "learning_rate": rate} | plain


def _plain(value: np.ndarray) -> Any:
    """A Python number, or a list of them with four decimals."""
    if value.ndim:
        return np.round(value, 4).tolist()
    return int(value) if value.dtype.kind in "iu" else float(value)


def not_finite(record: Record) -> str | None:
    """The name of the first number that is not finite."""
    numbers = {key: value for key, value in record.items() if isinstance(value, float)}
    return next((key for key, value in numbers.items() if not math.isfinite(value)), None)


def without_not_finite(record: Record) -> Record:
    """The record of a step that was skipped: None in place of numbers that JSON does not have."""

    def known(value: Any) -> Any:
        if isinstance(value, list):
            return [known(x) for x in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: known(value) for name, value in record.items()}


class Meter:
    """Counts tokens, targets and steps from one record to the next.

    The model's floating-point operations are those of `plan.model_flops` for the rows of the
    batches' first array; MFU is their rate over the devices' peak in bfloat16.
    """

    def __init__(self, model: Llama4Config | None, trainable: Trainable, mesh: jax.sharding.Mesh):
        """Starts the clock.

        Args:
            model: whose operations count; None counts none.
            trainable: which parameters are trained.
            mesh: the devices.
        """
        self._flops: Callable[[int, int], float] | None = None
        if model is not None:
            self._flops = lambda rows, length: model_flops(model, rows, length, trainable)
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._peak = None if peak is None else peak * mesh.size
        self._flops_a_step: float | None = None
        self.restart()

    def restart(self) -> None:
        """Begins the interval of the next record."""
        self._steps, self._tokens, self._targets = 0, 0, 0.0
        self._start = time.perf_counter()

    def count_step(self, batch: Any) -> None:
        """Counts the tokens of a step's batches, whose first array has them, rows last but one."""
        tokens = jax.tree.leaves(batch)[0]
        self._steps += 1
        self._tokens += tokens.size
        if self._flops is not None and self._flops_a_step is None and tokens.ndim > 1:
            length = tokens.shape[-1]
            self._flops_a_step = self._flops(tokens.size // length, length)

    def count_targets(self, targets: float) -> None:
        """Counts the targets of a step that is done."""
        self._targets += targets

    def speed(self, targets: bool) -> Record:
        """Rates since the last record; MFU only where the devices' peak is known.

        Args:
            targets: whether the loss says how many there are.
        """
        seconds = time.perf_counter() - self._start
        record: Record = {"tokens_per_second": round(self._tokens / seconds, 1)}
        if targets:
            record["targets_per_second"] = round(self._targets / seconds, 1)
        record["seconds_per_step"] = round(seconds / max(1, self._steps), 6)
        if self._flops_a_step is not None:
            record["model_flops"] = self._flops_a_step
            if self._peak is not None:
                rate = self._flops_a_step * self._steps / seconds
                record["mfu"] = round(rate / self._peak, 4)
        return record
