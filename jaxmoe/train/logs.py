"""Records beside `metrics.jsonl`: in TensorBoard's files, or at W&B."""

import contextlib
import dataclasses
import hashlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.processes import is_first
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.metrics import Record

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def log_package(log_to: str | None) -> Any:
    """The module that writes records to `log_to`; None if there is nothing to write to.

    Raises:
        UserError: if it is not installed.
    """
    if log_to is None:
        return None
    name = PACKAGES[log_to]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"log_to {log_to} needs the package {name} ({error}); install it, or leave log_to out."
        ) from None


@contextlib.contextmanager
def open_log(config: TrainConfig, package: Any) -> Iterator[Callable[[Record], None]]:
    """Yields the function that writes a record; where there are several processes, one writes.

    Args:
        config: the run.
        package: what `log_package` returns.
    """
    if package is None or not is_first():
        yield lambda record: None
    elif config.log_to == "tensorboard":
        writer = package.SummaryWriter(str(Path(config.output) / "tensorboard"))
        with contextlib.closing(writer):
            yield lambda record: _add_scalars(writer, record)
    else:
        path = Path(config.output).resolve()  # runs of the same name are told apart by the rest
        name = f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        settings = dataclasses.asdict(config)
        with package.init(project="jaxmoe", id=name, resume="allow", config=settings) as run:
            yield lambda record: run.log(scalars(record), step=record["step"])


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record, without its step and without lists."""
    return {name: x for name, x in record.items() if isinstance(x, int | float) and name != "step"}


def _add_scalars(writer: Any, record: Record) -> None:
    for name, value in scalars(record).items():
        writer.add_scalar(name, value, record["step"])
