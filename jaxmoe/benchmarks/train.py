"""`jaxmoe benchmark train`: a training step against transformers, on the same weights and rows."""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxmoe.benchmarks import cpu
from jaxmoe.benchmarks.oracle import machine, one_device, oracle_python, run_script, write_model
from jaxmoe.benchmarks.timing import today, versions, write_json
from jaxmoe.config import Llama4Config, layer_kinds
from jaxmoe.model.params import init_params, num_params
from jaxmoe.plan.model_flops import model_flops
from jaxmoe.progress import task_progress
from jaxmoe.train.config import OptimizerConfig, TrainConfig
from jaxmoe.train.data import Batch
from jaxmoe.train.loss import next_token_loss
from jaxmoe.train.optimizer import make_optimizer
from jaxmoe.train.partition import everything, split
from jaxmoe.train.state import abstract_state, state_of
from jaxmoe.train.step import make_step

SIDES = ("jaxmoe", "transformers")


def add_parser(commands) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser("train", help="a training step against transformers on this CPU")
    parser.set_defaults(start=run_train)
    parser.add_argument("--output", metavar="FILE.json", help="where to write the figures")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4, help="rows a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--rounds", type=int, default=3, help="both sides, in turn")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each side in a round")


def run_train(args: argparse.Namespace) -> None:
    """Measures, writes the figures and prints them."""
    jax.config.update("jax_platforms", "cpu")
    figures = benchmark_train(args, oracle_python())
    write_json(args.output, figures)
    Console().print(train_table(figures))


def benchmark_train(args: argparse.Namespace, oracle: str) -> dict:
    """Times both libraries alternately; returns the figures."""
    config = dataclasses.replace(cpu.MODEL, layers=layer_kinds(args.layers))
    params = init_params(config, jax.random.key(0), jnp.float32)
    shape = (args.batch_size, args.length)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, shape).astype(np.int32)
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        model, rows = write_model(Path(folder), config, params), Path(folder) / "tokens.npy"
        np.save(rows, tokens)
        with task_progress("Rounds", args.rounds, "rounds") as advance:
            for _ in range(args.rounds):
                runs["jaxmoe"].append(_time_ours(config, params, tokens, args.repeats))
                flags = "--repeats", args.repeats
                runs["transformers"].append(
                    run_script(oracle, "hf_train_speed.py", model, rows, *flags)
                )
                advance(1)
    return _figures(args, config, runs)


def _time_ours(config: Llama4Config, params: dict, tokens: np.ndarray, repeats: int) -> dict:
    """Seconds of each step and the loss before the first, as `hf_train_speed.py` prints them."""
    optimizer_config = OptimizerConfig(peak_lr=1e-5, warmup_steps=0)
    run = TrainConfig(model={"": ""}, data=None, optimizer=optimizer_config, output="", steps=1000)
    mesh, optimizer = one_device(), make_optimizer(optimizer_config, run.steps)
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    frozen = split(params, everything)[1]
    seconds, losses = [], []
    with jax.set_mesh(mesh):
        abstract = abstract_state(params, optimizer, mesh)
        state = state_of(jax.tree.map(jnp.copy, params), optimizer, mesh)
        step = make_step(run, config, optimizer, next_token_loss(), abstract)
        batch = Batch(tokens, np.ones_like(tokens))
        for _ in range(repeats + 1):  # the first compiles
            start = time.perf_counter()
            state, outcome = step(frozen, state, batch)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - start)
            losses.append(float(outcome.metrics["loss"]))
    return {"seconds": seconds[1:], "loss": losses[0]}


def _figures(args: argparse.Namespace, config: Llama4Config, runs: dict[str, list[dict]]) -> dict:
    seconds = {
        side: statistics.median(second for run in runs[side] for second in run["seconds"])
        for side in SIDES
    }
    theirs = runs["transformers"][0]
    flops = model_flops(config, args.batch_size, args.length, everything)
    return {
        "date": today(),
        "machine": machine(),
        "versions": {**versions(), **{name: theirs[name] for name in ("torch", "transformers")}},
        "parameters": num_params(config),
        "rows": args.batch_size,
        "length": args.length,
        "repeats": args.rounds * args.repeats,
        "median_seconds": seconds,
        "tokens_per_second": {
            side: args.batch_size * args.length / seconds[side] for side in SIDES
        },
        "model_gflops_per_second": {side: flops / seconds[side] / 1e9 for side in SIDES},
        "times_faster": seconds["transformers"] / seconds["jaxmoe"],
        "losses": {side: runs[side][0]["loss"] for side in SIDES},
    }


def train_table(figures: dict) -> Table:
    """The figures as a table to print."""
    title = (
        f"A step of {figures['parameters'] / 1e6:.0f}M parameters, {figures['rows']} rows of "
        f"{figures['length']} tokens, AdamW, float32"
    )
    table = Table(title=title)
    for column in ("", *SIDES, "times faster"):
        table.add_column(column, justify="right" if column else "left")
    seconds, rate = figures["median_seconds"], figures["tokens_per_second"]
    ratio = f"{figures['times_faster']:.2f}"
    table.add_row("seconds", *(f"{seconds[side]:.2f}" for side in SIDES), ratio)
    table.add_row("tokens/s", *(f"{rate[side]:.0f}" for side in SIDES), "")
    speeds = figures["model_gflops_per_second"]
    table.add_row("model GFLOP/s", *(f"{speeds[side]:.1f}" for side in SIDES), "")
    losses = " and ".join(f"{figures['losses'][side]:.6f}" for side in SIDES)
    table.caption = f"Medians of {figures['repeats']} steps; first losses {losses}."
    return table
