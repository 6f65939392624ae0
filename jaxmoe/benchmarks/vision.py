"""`jaxmoe benchmark vision`: the vision tower against transformers, on the same weights."""

import argparse
import dataclasses
import os
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
from jaxmoe.benchmarks.oracle import machine, run_script, write_model
from jaxmoe.benchmarks.timing import today, versions, write_json
from jaxmoe.config import Llama4Config, VisionConfig
from jaxmoe.errors import UserError
from jaxmoe.model.params import init_params
from jaxmoe.model.vision import tile_features
from jaxmoe.plan.vision import tile_flops
from jaxmoe.progress import task_progress

SIDES = ("jaxmoe", "transformers")


def run_vision(args: argparse.Namespace) -> None:
    """Measures, writes the figures and prints them."""
    oracle = os.environ.get("JAXMOE_ORACLE_PYTHON")
    if not oracle:
        raise UserError("JAXMOE_ORACLE_PYTHON is not set; `make bench` says how to set it.")
    jax.config.update("jax_platforms", "cpu")
    figures = benchmark_vision(args, oracle)
    write_json(args.output, figures)
    Console().print(vision_table(figures))


def benchmark_vision(args: argparse.Namespace, oracle: str) -> dict:
    """Times both libraries alternately; returns the figures."""
    vision = VisionConfig(num_hidden_layers=args.layers)
    config = dataclasses.replace(cpu.MODEL, layers=cpu.MODEL.layers[:1], vision=vision)
    params = init_params(config, jax.random.key(0), jnp.float32)
    shape = (args.tiles, vision.image_size, vision.image_size, vision.num_channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    runs: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        tiles, features = Path(folder) / "tiles.npy", Path(folder) / "features.npy"
        np.save(tiles, pixels)
        model = write_model(Path(folder), config, params)
        flags = "--repeats", args.repeats, "--output", features
        theirs: dict = {}
        with task_progress("Rounds", args.rounds, "rounds") as advance:
            for _ in range(args.rounds):
                seconds, found = _time_ours(config, params["vision"], pixels, args.repeats)
                theirs = run_script(oracle, "hf_vision_speed.py", model, tiles, *flags)
                runs["jaxmoe"] += seconds
                runs["transformers"] += theirs["seconds"]
                difference = float(abs(found - np.load(features)).max())
                advance(1)
    return _figures(args, config, runs, difference, theirs)


def _time_ours(config: Llama4Config, params: dict, pixels: np.ndarray, repeats: int):
    """Seconds of each repeat, and the features."""
    run = jax.jit(lambda params, pixels: tile_features(config, params, pixels))
    seconds, features = [], np.zeros(0)
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        features = np.asarray(run(params, pixels))
        if repeat:  # the first run compiles
            seconds.append(time.perf_counter() - start)
    return seconds, features


def _figures(args, config: Llama4Config, runs, difference: float, theirs: dict) -> dict:
    seconds = {side: statistics.median(runs[side]) for side in SIDES}
    flops = args.tiles * tile_flops(config)
    named = {name: theirs[name] for name in ("torch", "transformers")}
    return {
        "date": today(),
        "machine": machine(),
        "versions": {**versions(), **named},
        "layers": args.layers,
        "tiles": args.tiles,
        "repeats": args.rounds * args.repeats,
        "median_seconds": seconds,
        "gflops_per_second": {side: flops / seconds[side] / 1e9 for side in SIDES},
        "times_faster": seconds["transformers"] / seconds["jaxmoe"],
        "largest_difference": difference,
    }


def vision_table(figures: dict) -> Table:
    """The figures as a table to print."""
    title = f"{figures['layers']} blocks of Llama 4's tower, {figures['tiles']} tiles, float32"
    table = Table(title=title)
    for column in ("", *SIDES, "times faster"):
        table.add_column(column, justify="right" if column else "left")
    seconds = [f"{figures['median_seconds'][side]:.2f}" for side in SIDES]
    table.add_row("seconds", *seconds, f"{figures['times_faster']:.2f}")
    table.add_row("GFLOP/s", *(f"{figures['gflops_per_second'][side]:.0f}" for side in SIDES), "")
    table.caption = (
        f"Medians of {figures['repeats']} runs; features differ by at most "
        f"{figures['largest_difference']:.1g}."
    )
    return table
