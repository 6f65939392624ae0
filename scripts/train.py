#!/usr/bin/env python
"""Trains a model as one YAML file says; run it again to resume (see jaxmoe/train/config.py)."""

import argparse
import sys

import _devices
import jax
from _cli import run, task_progress

from jaxmoe.train.config import read_train_config
from jaxmoe.train.trainer import Record, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml", help="fields of TrainConfig")
    args = parser.parse_args()
    config = read_train_config(args.config)
    mesh = _devices.start(argparse.Namespace(mesh=config.mesh, cpu_devices=config.cpu_devices))
    tokens_a_step = config.data.batch_size * config.data.length
    show_lines = not sys.stderr.isatty()
    done = 0
    with (
        jax.set_mesh(mesh),
        task_progress("Training", config.steps * tokens_a_step, "tokens") as advance,
    ):
        for record in train(config, mesh, args.config):
            advance((record["step"] - done) * tokens_a_step)
            done = record["step"]
            if show_lines:
                print(line(record, config.steps), file=sys.stderr, flush=True)
    print(f"Wrote {config.output}/checkpoint after {config.steps} steps.")


def line(record: Record, steps: int) -> str:
    """One line of a log."""
    shown = ("loss", "held_out_loss", "gradient_norm", "router_peak", "tokens_per_second")
    values = (f"{name} {record[name]:.4g}" for name in shown if name in record)
    return f"step {record['step']}/{steps}  " + "  ".join(values)


if __name__ == "__main__":
    run(main)
