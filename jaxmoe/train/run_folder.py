"""A run's folder: written by one process at a time, and finished at once or not at all."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmoe.checkpoint import store
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.fields import read_fields
from jaxmoe.files.atomic import locked, writable
from jaxmoe.files.outputs import PARTIAL, write_file
from jaxmoe.parsing import MAX_TEXT_BYTES, parse_json, read_json, read_text
from jaxmoe.train.config import TrainConfig

DATA = "data"  # the folder of tokenized documents


class RunFolder:
    """The files that a run writes. Nothing is written before `claimed`.

    Attributes:
        path: the folder; in it `config.json` says which run it is.
        checkpoint: the result, there once the run is finished.
        states: what a killed run resumes from.
        metrics: a record a line.
    """

    def __init__(self, config: TrainConfig):
        """Names the files; reads and writes nothing.

        Raises:
            UserError: if the config holds what no JSON can.
        """
        self._config = config
        self._text = _as_json(config)
        self.path = Path(config.output)
        self.checkpoint = self.path / "checkpoint"
        self.states = self.path / "states"
        self.metrics = self.path / "metrics.jsonl"
        self._partial = self.path / "partial"  # the checkpoint, until it is whole

    def is_finished(self) -> bool:
        """Whether the run was finished before; also removes files that it left behind then.

        Raises:
            UserError: if the folder is not this run's.
        """
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
        """A context in which this process owns the folder.

        Raises:
            UserError: if it is another's, or cannot be written.
        """
        with contextlib.ExitStack() as stack:
            with writable(self.path):
                self._check_owner()
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.path))
                self._check_owner()  # another process may have been faster
                if self.checkpoint.exists():
                    raise UserError(f"{self.path} was finished by another run; run again.")
                write_file(self.path / "config.json", self._text)
            yield

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line to the metrics."""
        with writable(self.metrics), open(self.metrics, "a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def cut_back(self, step: int) -> None:
        """Removes the records of steps that will be taken again, and a line cut short.

        Raises:
            UserError: if the metrics hold anything else.
        """
        if not self.metrics.exists():
            return
        lines = read_text(self.metrics, MAX_TEXT_BYTES).splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        kept = (line for i, line in enumerate(lines, 1) if self._step_of(line, i) <= step)
        write_file(self.metrics, "".join(kept))

    def finish(self, model: Llama4Config, params: dict) -> None:
        """Writes the checkpoint that the other scripts read; nothing is left to resume from."""
        with writable(self.path):
            shutil.rmtree(self._partial, ignore_errors=True)
            store.save(self._partial / "checkpoint", model, params)
            if self._config.tokenizer_folder is not None:
                folder = Path(self._config.tokenizer_folder)
                store.copy_companions(folder, self._partial / "checkpoint")
            (self._partial / "checkpoint").rename(self.checkpoint)
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
            return _as_json(read_fields(TrainConfig, read_json(file), str(file))) == self._text
        except UserError:  # it is of another version, or no config at all
            return False

    def _step_of(self, line: str, number: int) -> int:
        record = parse_json(line, f"{self.metrics} line {number}")
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise UserError(f"{self.metrics} line {number} is no record of a step; delete it.")
        return record["step"]


def _as_json(config: TrainConfig) -> str:
    try:
        return json.dumps(dataclasses.asdict(config), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"'model' is no config.json: {error}; correct it.") from None
