"""Trains a model as one YAML file says; run it again to resume (docs/training.md).

SIGTERM and SIGUSR1 end it after the step that is running, with its state saved and exit code 75.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator

import jax
from rich.console import Console

from jaxmoe.cli import devices
from jaxmoe.cli.launch import is_spare
from jaxmoe.cli.show_data import show_examples, skipped_rows
from jaxmoe.cli.signals import asked_to_stop
from jaxmoe.errors import UserError
from jaxmoe.plan.targets import parse_target
from jaxmoe.plan.work import STORAGE_FORMATS
from jaxmoe.progress import task_progress
from jaxmoe.text import Tokenizer
from jaxmoe.train.batches import TrainingData
from jaxmoe.train.config import TrainConfig, read_train_config
from jaxmoe.train.metrics import Record
from jaxmoe.train.run_folder import RunFolder
from jaxmoe.train.trainer import data_of, train


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml", help="fields of TrainConfig")
    parser.add_argument(
        "--show-data",
        type=int,
        nargs="?",
        const=3,
        metavar="N",
        help="print N examples of the data (3), what the loss counts in colour, and do not train",
    )
    parser.add_argument(
        "--plan",
        metavar="TARGET",
        help="compile the step for hardware that need not be there, such as h100x8, print the "
        "memory that it takes, and do not train",
    )
    parser.add_argument(
        "--model", help="with --plan: scout, maverick or a folder, where `init` is not there yet"
    )
    parser.add_argument(
        "--weights",
        choices=STORAGE_FORMATS,
        help="with --plan: what matrices that are not trained are stored in",
    )
    return parser


def main() -> None:
    """Runs the command."""
    parser = make_parser()
    args = parser.parse_args()
    config = read_train_config(args.config)
    if args.plan is None and (args.model or args.weights):
        parser.error("--model and --weights go with --plan.")
    if args.plan is not None:
        if not is_spare():
            plan_run(config, args)
        return
    mesh = devices.start(argparse.Namespace(mesh=config.mesh, cpu_devices=config.cpu_devices))
    folder = RunFolder(config)
    if folder.is_finished():
        print(f"{folder.checkpoint} is finished: nothing is left to do.")
        return
    data = data_of(config, args.config)
    if args.show_data is not None:
        show(config, data, args.show_data, Console())
        return
    _tell(config, data)
    with jax.set_mesh(mesh), asked_to_stop() as stop, _shown(config) as show_record:
        for record in train(config, mesh, args.config, data=data, stop=stop):
            show_record(record)
    print(f"Wrote {folder.checkpoint} after {config.steps} steps.")
    if data.skipped:
        print(skipped_rows(folder.path, data.skipped), file=sys.stderr)


def plan_run(config: TrainConfig, args: argparse.Namespace) -> None:
    """Prints what a step of the run takes on a target.

    Raises:
        UserError: if it does not fit.
    """
    from jaxmoe.train.fits import compile_run, memory_table  # imports the compilers

    jax.config.update("jax_platforms", "cpu")  # plans need no accelerator
    weights = None if args.weights == "bf16" else args.weights
    model = args.model or config.init
    found = compile_run(config, parse_target(args.plan), model, weights, args.config)
    Console().print(memory_table(found))
    if not found.fits:
        raise UserError(
            f"a step takes {found.peak / 1e9:.1f} GB, but a device has "
            f"{found.target.limit / 1e9:.1f} GB; use more devices, another mesh, shorter or fewer "
            "rows (with `accumulate`), or `remat: full`."
        )


def _tell(config: TrainConfig, data: TrainingData) -> None:
    """Says on stderr what there is to train on, with an example if people read it."""
    if data.summary:
        print(f"Data: {data.summary}.", file=sys.stderr)
        if sys.stderr.isatty():
            show(config, data, 1, Console(stderr=True))


def show(config: TrainConfig, data: TrainingData, count: int, console: Console) -> None:
    """Prints examples of a run's data.

    Raises:
        UserError: if there is no tokenizer to write them with.
    """
    folder = config.tokenizer_folder
    tokenizer = Tokenizer.load_if_any(folder) if folder is not None else None
    if tokenizer is None:
        raise UserError("showing data needs a tokenizer; give 'tokenizer', a folder that has one.")
    show_examples(data, tokenizer, count, console)


@contextlib.contextmanager
def _shown(config: TrainConfig) -> Iterator[Callable[[Record], None]]:
    """Yields a function that shows a record: in a progress bar, or as a line without one."""
    tokens_a_step = config.rows.batch_size * config.rows.length * config.accumulate
    show_lines = not sys.stderr.isatty()
    done = 0
    with task_progress("Training", config.steps * tokens_a_step, "tokens") as advance:

        def show_record(record: Record) -> None:
            nonlocal done
            advance((record["step"] - done) * tokens_a_step, losses(record))
            done = record["step"]
            if show_lines:
                print(line(record, config.steps), file=sys.stderr, flush=True)

        yield show_record


def losses(record: Record) -> str:
    """The losses of a record in words, for a progress bar."""
    return numbers(record, ("loss", "held_out_loss"))


def line(record: Record, steps: int) -> str:
    """A record as one line of a log."""
    shown = ("loss", "held_out_loss", "gradient_norm", "router_peak", "tokens_per_second", "mfu")
    return f"step {record['step']}/{steps}  " + numbers(record, shown)


def numbers(record: Record, names: tuple[str, ...]) -> str:
    """Metrics as `name value`, those of `names` that the record has."""
    known = (name for name in names if record.get(name) is not None)
    return "  ".join(f"{name} {record[name]:.4g}" for name in known)
