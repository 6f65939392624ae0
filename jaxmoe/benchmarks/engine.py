"""`jaxmoe benchmark engine`: many requests in the engine, beside batches of transformers.

It wants idle cores: beside other processes torch's threads wait for one another, and it gets slower
by more than its share. Answers may differ where transformers' own depend on left padding, which
shifts its temperature at positions from `floor_scale` on.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxmoe.benchmarks import cpu, tables
from jaxmoe.benchmarks.engine_run import Run, timed_run
from jaxmoe.benchmarks.oracle import machine, one_device, run_script, write_model
from jaxmoe.benchmarks.timing import git_commit, today, versions, write_json
from jaxmoe.benchmarks.workloads import WORKLOADS, requests_of
from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.export import export
from jaxmoe.checkpoint.heads import load_head
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation.engine import STEP_TOKENS, Request, fit_context
from jaxmoe.model.params import init_params, num_params
from jaxmoe.model.steps import step
from jaxmoe.progress import task_progress

BATCH = 8  # requests of a batch of transformers


class Model(NamedTuple):
    """A model in float32 on one device; `folder` is its checkpoint, None for random weights."""

    config: Llama4Config
    params: dict
    folder: str | None


class Oracle(NamedTuple):
    """Transformers on the same model: its Python, the model in its layout, a folder to work in."""

    python: str
    model: Path
    folder: Path

    def run(self, requests: Sequence[Request]) -> dict:
        """What `hf_batches.py` prints."""
        asked = [{"tokens": r.tokens, "new_tokens": r.max_new_tokens} for r in requests]
        file = self.folder / "requests.json"
        file.write_text(json.dumps(asked))
        return run_script(self.python, "hf_batches.py", self.model, file, "--batch", BATCH)


def add_parser(commands: Any) -> None:
    """Adds the subcommand to an argument parser's subcommands."""
    parser = commands.add_parser(
        "engine", help="many requests on this CPU; beside transformers by JAXMOE_ORACLE_PYTHON"
    )
    parser.set_defaults(start=run_engine)
    parser.add_argument("model", nargs="?", help="a checkpoint's folder; default: random weights")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 128], metavar="N")
    parser.add_argument("--rounds", type=int, default=3, help="both sides, in turn")
    parser.add_argument("--requests", type=int, metavar="N", help="default: the workload's own")
    parser.add_argument("--step-tokens", type=int, default=STEP_TOKENS, metavar="N")
    parser.add_argument("--drafts", type=int, metavar="N", help="default: as `jaxmoe generate`")
    parser.add_argument("--head", metavar="FOLDER", help="an EAGLE-3 head of MODEL that drafts")
    parser.add_argument("--output", metavar="FILE.json", help="where to write the figures")


def run_engine(args: argparse.Namespace) -> None:
    """Measures each workload in turn, writes the figures and prints them.

    Raises:
        UserError: if a number is below 1, the model cannot be loaded, or transformers fails.
    """
    _check(args)
    jax.config.update("jax_platforms", "cpu")
    with jax.set_mesh(one_device()), tempfile.TemporaryDirectory() as folder:
        model, oracle = _load(args.model), None
        if python := os.environ.get("JAXMOE_ORACLE_PYTHON"):
            oracle = Oracle(python, _exported(model, Path(folder)), Path(folder))
        figures = _header(args, model)
        for name in dict.fromkeys(args.workload):
            figures["workloads"].append(_workload(args, name, model, oracle))
            write_json(args.output, figures)
    Console().print(_table(figures))


def _check(args: argparse.Namespace) -> None:
    numbers = {"--rows": min(args.rows), "--rounds": args.rounds, "--step-tokens": args.step_tokens}
    for flag, number in (numbers | {"--requests": args.requests}).items():
        if number is not None and number < 1:
            raise UserError(f"{flag} {number} is below 1.")
    if args.drafts is not None and args.drafts < 0:
        raise UserError(f"--drafts {args.drafts} is below 0.")
    if args.head is not None and args.model is None:
        raise UserError(f"--head {args.head} is of a model; name its checkpoint too.")


def _load(folder: str | None) -> Model:
    if folder is not None:
        return Model(*store.load(folder, one_device(), jnp.float32), folder)
    layout = jax.sharding.NamedSharding(one_device(), jax.sharding.PartitionSpec())
    params = init_params(cpu.MODEL, jax.random.key(0), jnp.float32)
    return Model(cpu.MODEL, jax.device_put(params, layout), None)


def _exported(model: Model, folder: Path) -> Path:
    """The model in the Hugging Face layout, below a folder."""
    if model.folder is None:
        return write_model(folder, model.config, model.params)
    export(model.folder, folder / "model")
    return folder / "model"


def _header(args: argparse.Namespace, model: Model) -> dict:
    return {
        "date": today(),
        "commit": git_commit(),
        "machine": machine(),
        "load": os.getloadavg()[0],  # of other processes: with it, both sides are slower
        "versions": versions(),
        "model": "random" if model.folder is None else Path(model.folder).resolve().name,
        "parameters": num_params(model.config),
        "rounds": args.rounds,
        "step_tokens": args.step_tokens,
        "drafts": args.drafts,
        "head": args.head is not None,
        "workloads": [],
    }


def _workload(args: argparse.Namespace, name: str, model: Model, oracle: Oracle | None) -> dict:
    """The figures of a workload."""
    drawn = requests_of(name, model.config.vocab_size, args.requests)
    requests = [fit_context(model.config, request) for request in drawn]
    jax.clear_caches()  # no program of an earlier workload spares this one a compilation
    runs = len(set(args.rows)) * (1 + args.rounds) + args.rounds * (oracle is not None)
    with task_progress(name, runs, "runs") as advance:
        engine, theirs = _alternate(args, model, requests, oracle, advance)
    prompts = sum(len(request.tokens) for request in requests)
    answers = sum(request.max_new_tokens for request in requests)
    return {
        "workload": name,
        "requests": len(requests),
        "prompt_tokens": prompts,
        "answer_tokens": answers,
        "real_tokens": prompts + answers - len(requests),  # the last token of each is not fed
        **compared(engine, theirs, requests),
    }


def _alternate(
    args: argparse.Namespace,
    model: Model,
    requests: Sequence[Request],
    oracle: Oracle | None,
    advance: Callable[[int], None],
) -> tuple[dict[int, tuple[dict, list[Run]]], list[dict]]:
    """Runs all sides in turn, after a run for each number of rows that compiles its programs.

    Returns:
        For each number of rows the figures of its first run, and its other runs; and what each run
        of transformers printed.
    """
    head = None
    if args.head is not None:
        head = load_head(args.head, one_device(), model.config, jnp.float32)

    def run(rows: int) -> Run:
        options = {"step_tokens": args.step_tokens, "drafts": args.drafts, "head": head}
        done = timed_run(model.config, model.params, requests, rows, **options)
        advance(1)
        return done

    engine = {rows: (_first(run, rows), []) for rows in dict.fromkeys(args.rows)}
    theirs = []
    for _ in range(args.rounds):
        for rows, (_, runs) in engine.items():
            runs.append(run(rows))
        if oracle is not None:
            theirs.append(oracle.run(requests))
            advance(1)
    return engine, theirs


def _first(run: Callable[[int], Run], rows: int) -> dict:
    """Seconds of a run that compiles, and how many programs of the model's step it makes."""
    before = _step_programs()
    return {"first_run_seconds": run(rows).seconds, "step_programs": _step_programs() - before}


def _step_programs() -> int:
    return step._cache_size()  # pyrefly: ignore  # of a jitted function


def compared(
    engine: dict[int, tuple[dict, list[Run]]], theirs: list[dict], requests: Sequence[Request]
) -> dict:
    """The figures of the engine by rows, and beside them those of transformers, if it ran.

    Args:
        engine: as `_alternate` returns it, and so is `theirs`.
        requests: in the order of their answers in `theirs`.
    """
    sides = [rows_figures(rows, first, runs) for rows, (first, runs) in engine.items()]
    if not theirs:
        return {"engine": sides, "transformers": None}
    other = _transformers(theirs)
    wanted = dict(zip((request.id for request in requests), theirs[0]["answers"], strict=True))
    for side, (_, runs) in zip(sides, engine.values(), strict=True):
        side["times_faster"] = side["tokens_per_second"] / other["tokens_per_second"]
        same = [tokens == wanted[id] for id, tokens in runs[0].answers.items()]
        side["identical"] = sum(same) / len(same)
    return {"engine": sides, "transformers": other}


def rows_figures(rows: int, first: dict, runs: Sequence[Run]) -> dict:
    """The figures of the engine with so many rows, over its runs after the first.

    `tokens` and `slots_a_token` are of the steps: tokens that they computed, and places in them for
    each. `answer_tokens_a_step` counts tokens that answers got. `host_seconds_a_step` is explained
    in `TimedEngine`.
    """
    last, seconds = runs[-1], [run.seconds for run in runs]
    answered = sum(map(len, last.answers.values()))
    return {
        "rows": rows,
        "seconds": seconds,
        "tokens_per_second": answered / statistics.median(seconds),
        "tokens": last.tokens,
        "slots_a_token": last.slots / last.tokens,
        "steps": last.steps,
        "answer_tokens_a_step": answered / last.steps,
        "drafted": last.drafted,
        "accepted": last.accepted,
        "first_token_seconds": _spread([x for run in runs for x in run.first_token]),
        "after_admission_seconds": _spread([x for run in runs for x in run.after_admission]),
        "host_seconds_a_step": statistics.median(x for run in runs for x in run.host),
        **first,
    }


def _transformers(theirs: Sequence[dict]) -> dict:
    seconds = [run["seconds"] for run in theirs]
    tokens = sum(map(len, theirs[0]["answers"]))
    return {
        "batch": BATCH,
        "seconds": seconds,
        "tokens_per_second": tokens / statistics.median(seconds),
        "versions": {name: theirs[0][name] for name in ("torch", "transformers")},
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "p90": float(np.percentile(seconds, 90))}


def _table(figures: dict) -> Table:
    title = f"{figures['model']}, {figures['parameters'] / 1e6:.0f}M parameters, float32"
    table = tables.for_terminal(tables.engine_grid(figures), title)
    table.caption = tables.identical_text(figures)
    return table
