"""Trains a model as one YAML file says; run it again to resume (docs/training.md)."""

import argparse
import sys

import jax

from jaxmoe.cli import devices
from jaxmoe.progress import task_progress
from jaxmoe.train.config import read_train_config
from jaxmoe.train.run_folder import RunFolder
from jaxmoe.train.trainer import Record, train


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml", help="fields of TrainConfig")
    args = parser.parse_args()
    config = read_train_config(args.config)
    folder = RunFolder(config)
    if folder.is_finished():
        print(f"{folder.checkpoint} is finished: nothing is left to do.")
        return
    mesh = devices.start(argparse.Namespace(mesh=config.mesh, cpu_devices=config.cpu_devices))
    tokens_a_step = config.rows.batch_size * config.rows.length
    show_lines = not sys.stderr.isatty()
    done = 0
    with (
        jax.set_mesh(mesh),
        task_progress("Training", config.steps * tokens_a_step, "tokens") as advance,
    ):
        for record in train(config, mesh, args.config):
            advance((record["step"] - done) * tokens_a_step, losses(record))
            done = record["step"]
            if show_lines:
                print(line(record, config.steps), file=sys.stderr, flush=True)
    print(f"Wrote {folder.checkpoint} after {config.steps} steps.")


def losses(record: Record) -> str:
    """The losses of a record in words, for a progress bar."""
    return numbers(record, ("loss", "held_out_loss"))


def line(record: Record, steps: int) -> str:
    """A record as one line of a log."""
    shown = ("loss", "held_out_loss", "gradient_norm", "router_peak", "tokens_per_second")
    return f"step {record['step']}/{steps}  " + numbers(record, shown)


def numbers(record: Record, names: tuple[str, ...]) -> str:
    """Metrics as `name value`, those of `names` that the record has."""
    return "  ".join(f"{name} {record[name]:.4g}" for name in names if name in record)
