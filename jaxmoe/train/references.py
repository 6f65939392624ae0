"""The reference of training on pairs: its log-probabilities, computed once and kept in a file."""

import dataclasses
import functools
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.files.atomic import writable
from jaxmoe.files.outputs import PARTIAL
from jaxmoe.processes import on_first
from jaxmoe.progress import task_progress
from jaxmoe.train.batches import TrainingData
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.loss import Loss, targets_of
from jaxmoe.train.preferences import PreferenceBatch, answers
from jaxmoe.train.step import TARGETS, cast_all

FILE = "reference.npz"


@dataclasses.dataclass
class SavedReferences:
    """The log-probabilities of the model that a run begins with.

    Attributes:
        config, model, mesh: of the run.
        pairs: how many there are.
        rows: all of them once, in batches.
        made_of: a digest of what they were read from.
        table: [pairs, 2], of the chosen and the rejected answers; None until `fill`.
    """

    config: TrainConfig
    model: Llama4Config
    mesh: jax.sharding.Mesh
    pairs: int
    rows: Callable[[], Iterator[PreferenceBatch]]
    made_of: str
    table: Float[np.ndarray, "pairs 2"] | None = None

    @property
    def path(self) -> Path:
        """The file, in the run's folder."""
        return Path(self.config.output) / FILE

    def fill(self, params: Callable[[], dict], *, begun: bool) -> None:
        """Reads the table, or computes and writes it.

        Args:
            params: makes the parameters that the run begins with.
            begun: whether the run has taken steps before, and so must have the file.

        Raises:
            UserError: if the file is missing or damaged, or cannot be written.
        """
        if self.path.exists():
            self.table = self._read()
        elif begun:
            raise UserError(f"{self.path} is missing; restore it, or delete the run to begin anew.")
        else:
            table = self.table = self._compute(params())
            on_first(lambda: self._write(table))

    def attached(self, batch: PreferenceBatch) -> PreferenceBatch:
        """The batch with the reference's log-probabilities of its pairs; 0 where there is none."""
        assert self.table is not None, "`fill` comes first"
        found = np.where((batch.document >= 0)[..., None], self.table[batch.document], 0.0)
        return batch._replace(reference=found.astype(np.float32))

    def _compute(self, params: dict) -> Float[np.ndarray, "pairs 2"]:
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        run = jax.jit(functools.partial(_both, self.model), out_shardings=everywhere)
        params = cast_all(params, self.config.dtype)
        table = np.zeros((self.pairs, 2), np.float32)
        with task_progress("Reference", self.pairs, "pairs") as advance:
            for batch in self.rows():
                found = np.asarray(run(params, jax.tree.map(jnp.asarray, batch)))
                real = batch.document >= 0
                table[batch.document[real]] = found[real]
                advance(int(real.sum()))
        return table

    def _read(self) -> Float[np.ndarray, "pairs 2"]:
        """The table of the file, which has to be of this run's rows."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                table, made_of = file["table"], str(file["made_of"])
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path} cannot be read: {error}; restore it.") from None
        if made_of != self.made_of or table.shape != (self.pairs, 2):
            raise UserError(
                f"{self.path} is of other pairs than data has now; restore them, or delete the run "
                "to begin anew."
            )
        return table

    def _write(self, table: Float[np.ndarray, "pairs 2"]) -> None:
        content = io.BytesIO()
        np.savez(content, table=table, made_of=self.made_of)
        with writable(self.path):
            partial = self.path.with_name(FILE + PARTIAL)
            partial.write_bytes(content.getvalue())
            partial.replace(self.path)


def _both(model: Llama4Config, params: dict, batch: Any) -> Float[jax.Array, "rows pairs 2"]:
    """The log-probabilities of the chosen and the rejected answer of each pair."""
    pairs = answers(model, params, batch).pairs
    return jnp.stack([pairs.chosen, pairs.rejected], -1)


def held_out_preferences(
    config: TrainConfig,
    measure: Callable[[dict, Any], dict[str, jax.Array]],
    batches: Callable[[], Iterator[PreferenceBatch]],
    params: dict,
) -> dict[str, Any]:
    """The metrics of a preference loss over held-out pairs; empty if there are none.

    Each has `held_out_` before its name, as in `held_out_loss`.

    Args:
        config: of the run.
        measure: the metrics of a batch, of the parameters in `config.dtype`; compiled.
        batches: the held-out pairs.
        params: all parameters.
    """
    params = cast_all(params, config.dtype)
    found = [jax.device_get(measure(params, jax.tree.map(jnp.asarray, x))) for x in batches()]
    means = {}
    for name in found[0] if found else {}:
        weights = np.array([float(targets_of(name, one)) for one in found])
        counts = name.partition("/")[0] == TARGETS or np.ndim(found[0][name])
        if not counts and weights.any():
            means[name] = np.average([one[name] for one in found], weights=weights)
    return {f"held_out_{name}": float(x) for name, x in means.items()}


class PreferenceRun(NamedTuple):
    """What a run on pairs takes in place of the defaults of `train`."""

    batches: Callable[[int], PreferenceBatch]
    evaluate: Callable[[dict], dict[str, Any]]
    references: SavedReferences | None


def preference_run(
    config: TrainConfig,
    model: Llama4Config,
    mesh: jax.sharding.Mesh,
    found: TrainingData,
    loss: Loss,
) -> PreferenceRun:
    """The batches, evaluation and reference of a run with `config.preference`.

    The reference is the model without adapters, if the run's adapters begin as nothing, and else
    what the run begins with, as `SavedReferences` keep it.
    """
    assert found.everything is not None
    references = None
    if config.adapter is None or config.adapter.init is not None:
        rows = cast(Any, found.everything)
        references = SavedReferences(config, model, mesh, found.pairs, rows, found.made_of)

    def attached(batch: Any) -> PreferenceBatch:
        return batch if references is None else references.attached(batch)

    def batches(number: int) -> PreferenceBatch:
        return attached(found.batches(number))

    def held_out() -> Iterator[PreferenceBatch]:
        return map(attached, found.held_out())

    measure = jax.jit(lambda params, batch: loss(model, params, batch)[1])
    evaluate = functools.partial(held_out_preferences, config, measure, held_out)
    return PreferenceRun(batches, evaluate, references)
