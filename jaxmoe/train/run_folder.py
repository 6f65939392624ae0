"""A run's folder: written by one process at a time, and finished at once or not at all."""

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.heads import write_head
from jaxmoe.checkpoint.peft import write_adapter
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.fields import read_fields
from jaxmoe.files.atomic import locked, writable
from jaxmoe.files.outputs import PARTIAL, write_file
from jaxmoe.parsing import MAX_TEXT_BYTES, parse_json, read_json, read_text
from jaxmoe.processes import on_first
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.curves import draw_losses
from jaxmoe.train.eagle import HEAD, TOKEN_IDS, eagle_config
from jaxmoe.train.metrics import HELD_OUT_LOSS

# What may change from one start of a run to the next: its steps stay the same but for rounding.
CHANGEABLE = ("mesh", "cpu_devices", "remat", "save_every", "log_to")
DATA = "data"  # the folder of tokenized documents


class RunFolder:
    """The files that a run writes. Nothing is written before `claimed`.

    Attributes:
        path: the folder; in it `config.json` says which run it is.
        checkpoint: the result, there once the run is finished; of a run with `adapter` or `head`,
            its folder.
        states: what a killed run resumes from.
        metrics: a record a line.
        best: the checkpoint of the least held-out loss, where the config asks for it.
    """

    def __init__(self, config: TrainConfig):
        """Names the files; reads and writes nothing.

        Raises:
            UserError: if the config holds what no JSON can.
        """
        self._config = config
        self._text = _as_json(config)
        self.path = Path(config.output)
        self.checkpoint = self.path / config.result
        self.states = self.path / "states"
        self.metrics = self.path / "metrics.jsonl"
        self.best = self.path / "best"
        self._least = math.inf  # held-out loss so far
        self._partial = self.path / "partial"  # the checkpoint, until it is whole

    def is_finished(self) -> bool:
        """Whether the run was finished before; also removes files that it left behind then.

        Raises:
            UserError: if the folder is not this run's.
        """
        return on_first(self._is_finished)

    def _is_finished(self) -> bool:
        with writable(self.path):
            self._check_owner()
            if not self.checkpoint.exists():
                return False
            if self.states.exists() or self._partial.exists():
                with locked(self.path):
                    self._clear()
        return True

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """A context in which this run's processes own the folder.

        Raises:
            UserError: if it is another's, or cannot be written.
        """
        with contextlib.ExitStack() as stack:
            on_first(lambda: self._claim(stack))
            yield

    def _claim(self, stack: contextlib.ExitStack) -> None:
        with writable(self.path):
            self._check_owner()
            self.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(self.path))
            self._check_owner()  # another process may have been faster
            if self.checkpoint.exists():
                raise UserError(f"{self.path} was finished by another run; run again.")
            write_file(self.path / "config.json", self._text)

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line to the metrics."""
        on_first(lambda: self._append(json.dumps(record, allow_nan=False)))
        self._least = min(self._least, record.get(HELD_OUT_LOSS, math.inf))

    def _append(self, line: str) -> None:
        with writable(self.metrics), open(self.metrics, "a") as file:
            file.write(line + "\n")

    def cut_back(self, step: int) -> None:
        """Removes the records of steps that will be taken again, and a line cut short.

        Raises:
            UserError: if the metrics hold anything else.
        """
        least = on_first(lambda: self._cut_back(step))
        self._least = math.inf if least is None else least

    def _cut_back(self, step: int) -> float | None:
        """The least held-out loss of the records that stay; None without one."""
        if not self.metrics.exists():
            return None
        lines = read_text(self.metrics, MAX_TEXT_BYTES).splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        records = [self._record_of(line, i) for i, line in enumerate(lines, 1)]
        kept = [record["step"] <= step for record in records]
        write_file(self.metrics, "".join(itertools.compress(lines, kept)))
        losses = (record.get(HELD_OUT_LOSS) for record in itertools.compress(records, kept))
        return min((loss for loss in losses if isinstance(loss, float)), default=None)

    def is_best(self, record: dict[str, Any]) -> bool:
        """Whether a record that is not yet appended has a smaller held-out loss than all before."""
        return record.get(HELD_OUT_LOSS, math.inf) < self._least

    def keep_best(self, model: Llama4Config, params: dict) -> None:
        """Replaces the checkpoint `best`; called before the record that says so is appended.

        A run that is killed in between has neither, and takes the step again.
        """
        self._save(self._partial / "best", model, params)
        on_first(lambda: self._publish(self._partial / "best", self.best))

    def finish(self, model: Llama4Config, params: dict) -> None:
        """Writes the checkpoint that the other commands read, and draws the losses.

        Nothing is left to resume from.
        """
        self._save(self._partial / "checkpoint", model, params)
        on_first(self._finish)

    def _save(self, path: Path, model: Llama4Config, params: dict) -> None:
        """Saves a checkpoint, an adapter or a head, by all processes together."""
        on_first(lambda: shutil.rmtree(self._partial, ignore_errors=True))
        if (adapter := self._config.adapter) is not None:
            write_adapter(path, model, params, rslora=adapter.rslora, layout=adapter.layout)
        elif (head := self._config.head) is not None:
            parts = params[HEAD], params[TOKEN_IDS]
            write_head(path, eagle_config(head, model), *parts, model.num_hidden_layers)
        else:
            store.save(path, model, params)

    def _publish(self, source: Path, place: Path) -> None:
        with writable(self.path):
            tokenizer = self._config.tokenizer_folder
            if self._config.result == "checkpoint" and tokenizer is not None:
                store.copy_companions(Path(tokenizer), source)
            if place.exists():
                shutil.rmtree(place)
            source.rename(place)

    def _finish(self) -> None:
        with writable(self.path):
            if self.metrics.exists():
                draw_losses(self.metrics, self.path / "losses.png")
        self._publish(self._partial / "checkpoint", self.checkpoint)
        with writable(self.path):
            self._clear()

    def _clear(self) -> None:
        for folder in (self.states, self._partial):
            if folder.exists():
                shutil.rmtree(folder)

    def _check_owner(self) -> None:
        """Raises a UserError if the folder holds another run."""
        file = self.path / "config.json"
        if file.exists():
            if not self._is_own(file):
                what = "finished run" if self.checkpoint.exists() else "run"
                raise UserError(
                    f"{self.path} holds a {what} of another config ({file}); choose another "
                    "output, delete it, or restore the config."
                )
        elif self.path.exists():
            prepared = {file.name + PARTIAL, DATA, DATA + PARTIAL}  # before a run is claimed
            if {path.name for path in self.path.iterdir()} - prepared:
                raise UserError(
                    f"{self.path} exists and is no training run; choose another output."
                )

    def _is_own(self, file: Path) -> bool:
        try:
            found = read_fields(TrainConfig, read_json(file), str(file))
            same = {name: getattr(self._config, name) for name in CHANGEABLE}
            return _as_json(dataclasses.replace(found, **same)) == self._text
        except UserError:  # it is of another version, or no config at all
            return False

    def _record_of(self, line: str, number: int) -> dict[str, Any]:
        record = parse_json(line, f"{self.metrics} line {number}")
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise UserError(f"{self.metrics} line {number} is no record of a step; delete it.")
        return record


def _as_json(config: TrainConfig) -> str:
    try:
        return json.dumps(dataclasses.asdict(config), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"'model' is no config.json: {error}; correct it.") from None
