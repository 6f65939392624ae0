"""`jaxmoe benchmark batch`: what a request of a large job costs beside the model, on this CPU."""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxmoe.batch.feed import Feed
from jaxmoe.batch.job import Job, JobOptions
from jaxmoe.benchmarks.oracle import machine, one_device
from jaxmoe.benchmarks.timing import git_commit, today, versions, write_json
from jaxmoe.config import SCOUT, layer_kinds
from jaxmoe.generation.feeding import generate_from
from jaxmoe.generation.jobs import RequestReader, finished
from jaxmoe.generation.request import fit_context
from jaxmoe.generation.sampling import Sampling
from jaxmoe.model.params import init_params
from jaxmoe.progress import task_progress

MODEL = dataclasses.replace(
    SCOUT,
    vocab_size=128,
    hidden_size=16,
    intermediate_size=16,
    intermediate_size_mlp=16,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=2,
    layers=layer_kinds(2, nope_interval=2),
    rope_scaling=None,
    max_position_embeddings=2048,
    eos_token_ids=(),
    pad_token_id=0,
    vision=None,
)
PROMPT, ANSWER, ROWS = 4, 4, 128  # tokens, and rows of the batch


def add_parser(commands: Any) -> None:
    """Adds the subcommand to an argument parser's subcommands."""
    parser = commands.add_parser("batch", help="a large job of tiny requests, on this CPU")
    parser.set_defaults(start=run_batch)
    parser.add_argument("--requests", type=int, default=100_000, metavar="N")
    parser.add_argument("--output", metavar="FILE.json", help="where to write the figures")


def run_batch(args: argparse.Namespace) -> None:
    """Measures, writes the figures and prints them."""
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(one_device()):
        figures = benchmark_batch(Path(folder), args.requests)
    write_json(args.output, figures)
    Console().print_json(json.dumps(figures))


def benchmark_batch(folder: Path, count: int) -> dict[str, Any]:
    """Runs a job, and then the same command once more, which finds all answers.

    Host time is the processor time of the thread that runs the job and the engine: reading rows,
    making steps, starting programs, writing answers. Steps are computed in other threads.
    """
    source = folder / "in.jsonl"
    with open(source, "w") as file:
        for n in range(count):
            tokens = [(n + i) % MODEL.vocab_size for i in range(PROMPT)]
            file.write(json.dumps({"id": n, "tokens": tokens, "max_tokens": ANSWER}) + "\n")
    params = init_params(MODEL, jax.random.key(0), jnp.float32)
    memory: list[int] = []
    begin, worked = time.perf_counter(), time.thread_time()
    with Job(str(folder / "out"), "benchmark", [str(source)], JobOptions()) as job:
        counted = time.perf_counter() - begin
        _answer(job, params, memory)
        job.summarize()
    seconds, worked = time.perf_counter() - begin, time.thread_time() - worked
    begin = time.perf_counter()
    with Job(str(folder / "out"), "benchmark", [str(source)], JobOptions()) as job:
        report, done = job.summarize(), job.done
    again = time.perf_counter() - begin
    tenth, last = (memory[i * (len(memory) - 1) // 10] / 2**20 for i in (1, 10))
    return {
        "run": {"date": today(), "commit": git_commit(), "machine": machine()}
        | {"versions": versions()},
        "requests": count,
        "answered": report["answered"],
        "complete": done,
        "seconds": seconds,
        "seconds_to_count_rows": counted,
        "host_milliseconds_a_request": 1000 * worked / count,
        "mebibytes_after_a_tenth": tenth,
        "mebibytes_at_the_end": last,
        "seconds_to_find_all_done": again,
    }


def _answer(job: Job, params: dict, memory: list[int]) -> None:
    """Answers all rows, and notes the process's memory as they end."""
    greedy = Sampling(temperature=0.0)

    def check(request):
        own = dataclasses.replace(request, sampling=request.sampling or greedy)
        return fit_context(MODEL, own)

    def reader_of(_: Path) -> RequestReader:
        return RequestReader(None, ANSWER, check, False, greedy)

    with task_progress("Generating", job.rows, "rows") as advance:
        feed = Feed(job, reader_of, ended=advance)
        stream = generate_from(MODEL, params, feed.more, rows=ROWS, stop_ids=())
        for _, record in finished(stream, None):
            if record is not None:
                feed.take_in(record)
                if len(memory) * 1000 <= record["id"]:
                    memory.append(_resident())


def _resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
