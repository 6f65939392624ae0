"""`jaxmoe benchmark step`: prefill and decode steps of a model, timed beside what `plan` says.

Weights are random, since what they are does not change how long a step takes, so that no checkpoint
is needed. A model with fewer layers shows what a layer takes where the whole does not fit.
"""

import argparse
import collections
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxmoe.benchmarks import tables
from jaxmoe.benchmarks.gpu import header
from jaxmoe.benchmarks.timing import write_json
from jaxmoe.errors import UserError
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.kv_cache import Cache, init_cache, round_capacity
from jaxmoe.model.params import abstract_params
from jaxmoe.model.steps import Inputs, last_logits, prefill, step
from jaxmoe.plan.models import read_model
from jaxmoe.plan.planner import make_plan
from jaxmoe.plan.targets import parse_target
from jaxmoe.plan.work import PREFILL_CHUNK, STORAGE_FORMATS, Work

SAMPLES, STEPS = 5, 16  # decode steps are timed in runs of STEPS, without waiting in between
PROFILED, MOST_KERNELS = 4, 12  # decode steps of a profile, and the kernels that it names
PLANNED = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"}  # targets by kind of device
NORMAL, SCALE = 0.02, 1e-3  # deviation of random weights, and the scale of quantized ones


def add_parser(commands: Any) -> None:
    """Adds the subcommand to an argument parser's subcommands."""
    parser = commands.add_parser("step", help="prefill and decode of a model, beside its plan")
    parser.set_defaults(start=run_step)
    parser.add_argument("model", help="scout, maverick, or a checkpoint's folder")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="B", help="rows")
    parser.add_argument("--context", type=int, default=PREFILL_CHUNK, metavar="N")
    parser.add_argument("--prefill-chunk", type=int, default=PREFILL_CHUNK, metavar="N")
    parser.add_argument("--weights", choices=STORAGE_FORMATS, default="bf16")
    parser.add_argument("--kv", choices=STORAGE_FORMATS, default="bf16")
    parser.add_argument("--mesh", default="tensor=-1", metavar="SPEC")
    parser.add_argument("--profile", action="store_true", help="also the time of each GPU kernel")
    parser.add_argument("--output", metavar="FILE.json", help="where to write the figures")


def run_step(args: argparse.Namespace) -> None:
    """Measures each batch size in turn, writes the figures and prints them."""
    work, mesh = _work(args), MeshConfig.parse(args.mesh)
    figures = header(jax.devices()[0])
    figures |= {"model": args.model, "layers": len(work.config.layers), "mesh": args.mesh}
    figures |= {"weights": work.weights, "kv": work.kv, "context": work.context, "batches": []}
    devices = mesh.make()
    batches = [dataclasses.replace(work, rows=rows) for rows in args.batch]
    with jax.set_mesh(devices):
        params = random_params(work, devices)
        for batch in batches:
            figures["batches"].append(step_figures(batch, params, mesh))
            write_json(args.output, figures)
        if args.profile:
            figures["profiles"] = [x for batch in batches for x in profiles(batch, params)]
            write_json(args.output, figures)
    title = f"{args.model}, {len(work.config.layers)} layers, {work.weights} weights"
    title += f", {work.kv} cache, {work.context} tokens; {figures['device']}"
    Console().print(tables.for_terminal(tables.step_grid(figures), title))
    if not all(batch["finite"] for batch in figures["batches"]):
        raise UserError("the logits are not all finite: a kernel is wrong on this device.")


def _work(args: argparse.Namespace) -> Work:
    """What to time, of all batch sizes.

    Raises:
        UserError: if a number is out of its range.
    """
    config, chunk = read_model(args.model), min(args.prefill_chunk, args.context)
    if args.layers is not None:
        if not 1 <= args.layers <= len(config.layers):
            raise UserError(f"--layers {args.layers} is not between 1 and {len(config.layers)}.")
        config = dataclasses.replace(config, layers=config.layers[: args.layers])
    sizes = {"context": args.context, "prefill_chunk": chunk, "rows": min(args.batch)}
    work = Work(config=config, weights=args.weights, kv=args.kv, **sizes)
    if args.context % chunk:
        raise UserError(f"--context {args.context} is no multiple of --prefill-chunk {chunk}.")
    return work


def random_params(work: Work, mesh: jax.sharding.Mesh) -> dict:
    """Random parameters in the work's format, made where they stay."""
    shapes = abstract_params(work.config, mesh, jnp.bfloat16, work.format)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    makers = (_maker(x.shape, x.dtype, x.sharding) for x in leaves)
    return tree.unflatten([make(key) for make, key in zip(makers, keys, strict=True)])


@functools.cache  # so that arrays alike share a program
def _maker(shape: tuple[int, ...], dtype, layout) -> Callable[[jax.Array], jax.Array]:
    """Makes random bits for integers, equal scales in float32, ones for norms, normal numbers."""

    def make(key):
        if dtype == jnp.int8:
            return jax.random.randint(key, shape, -127, 128, dtype)
        if dtype == jnp.float32:
            return jnp.full(shape, SCALE, dtype)
        if len(shape) == 1:
            return jnp.ones(shape, dtype)
        return (NORMAL * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)

    return jax.jit(make, out_shardings=layout)


def prefilled(work: Work, params: dict) -> tuple[list[float], Cache | None]:
    """Seconds of each chunk of random tokens, and the cache with all of them."""
    room = round_capacity(work.context + (SAMPLES + 1) * STEPS)
    cache, seconds = init_cache(work.config, work.rows, room, work.kv_dtype), []
    options = {"chunk": work.prefill_chunk, "readout": last_logits}
    begin = time.perf_counter()
    for part in prefill(work.config, params, _tokens(work), cache, **options):
        jax.block_until_ready(part.output)
        cache, end = part.cache, time.perf_counter()
        seconds.append(end - begin)
        begin = end
    return seconds, cache


def decoded(
    work: Work, params: dict, cache: Cache | None, start: int, count: int
) -> tuple[jax.Array, Cache | None]:
    """The logits of the last of some greedy steps from position `start` on, and the cache."""
    new, logits = jnp.asarray(_tokens(work)[:, :1]), jnp.zeros(())
    for position in range(start, start + count):
        inputs = Inputs(new, jnp.full_like(new, position), jnp.ones_like(new))
        logits, cache = step(work.config, params, inputs, cache, readout=last_logits)
        new = jnp.argmax(logits, -1).astype(jnp.int32)[:, None]
    return logits, cache


def _tokens(work: Work) -> np.ndarray:
    shape = work.rows, work.context
    return np.random.default_rng(0).integers(0, work.config.vocab_size, shape, np.int32)


def step_figures(work: Work, params: dict, mesh: MeshConfig) -> dict[str, Any]:
    """Seconds of each prefill chunk and of a decode step, with the plan's bound and estimate.

    The first calls, which compile, are apart.
    """
    first, _ = prefilled(work, params)
    seconds, cache = prefilled(work, params)
    runs, finite = [], True
    for run in range(SAMPLES + 1):
        begin = time.perf_counter()
        logits, cache = decoded(work, params, cache, work.context + run * STEPS, STEPS)
        jax.block_until_ready(logits)
        runs.append((time.perf_counter() - begin) / STEPS)
        finite &= bool(jnp.isfinite(logits).all())
    prefill_plan = _planned(dataclasses.replace(work, task="prefill"), mesh)
    return {
        "rows": work.rows,
        "prefill_chunk": work.prefill_chunk,
        "prefill": {"first": first[0], "seconds": seconds} | prefill_plan,
        "decode": {"first": STEPS * runs[0], "seconds": statistics.median(runs[1:])}
        | _planned(work, mesh),
        "finite": finite,
    }


def profiles(work: Work, params: dict) -> list[dict[str, Any]]:
    """The time of each GPU kernel in a decode step and in a prefill chunk, by JAX's profiler."""
    _, cache = prefilled(work, params)
    runs = {
        "decode": (lambda: decoded(work, params, cache, work.context, PROFILED), PROFILED),
        "prefill": (lambda: prefilled(work, params)[1], work.context // work.prefill_chunk),
    }
    return [
        {"task": task, "rows": work.rows, **kernel_times(run, steps)}
        for task, (run, steps) in runs.items()
    ]


def kernel_times(run: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Microseconds and launches of each GPU kernel, of one of the steps that `run` takes."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        lines = [line for plane in planes if "GPU" in plane.name for line in plane.lines]
        events = [
            (event.name, event.duration_ns / 1e3)
            for line in lines
            if "Stream" in line.name
            for event in line.events
        ]
    total, calls = collections.Counter(), collections.Counter(name for name, _ in events)
    for name, microseconds in events:
        total[name] += microseconds
    return {
        "busy_microseconds": total.total() / steps,
        "launches": calls.total() / steps,
        "kernels": [
            {"name": name, "microseconds": time / steps, "calls": calls[name] / steps}
            for name, time in total.most_common(MOST_KERNELS)
        ],
    }


def _planned(work: Work, mesh: MeshConfig) -> dict[str, float]:
    """The plan's bound and estimate of a step, if it knows the devices."""
    name, count = PLANNED.get(jax.devices()[0].device_kind), jax.device_count()
    if name is None or count not in (1, 2, 4, 8):
        return {}
    plan = make_plan("", work, parse_target(f"{name}x{count}"), mesh)
    return {"bound": plan.chosen.bounds.seconds, "estimate": plan.estimate}
