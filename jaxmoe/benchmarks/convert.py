"""`jaxmoe benchmark convert`: rate and peak memory of converting against `cp`, loading, running."""

import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxmoe.benchmarks.timing import today, versions, write_json
from jaxmoe.checkpoint.mapping import names
from jaxmoe.checkpoint.mapping.tensors import array_shapes, expand
from jaxmoe.config import SCOUT, layer_kinds
from jaxmoe.hf_config import from_hf, to_hf
from jaxmoe.progress import task_progress

CONVERT = [sys.executable, "-m", "jaxmoe", "convert"]
COPIES = ("cp", "cp, sync")
LAYERS, VOCAB = 1, 65536  # with Scout's other sizes this is 6 GB
LOAD = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from jaxmoe.checkpoint.store import load
from jaxmoe.mesh import MeshConfig
jax.block_until_ready(load(sys.argv[1], MeshConfig.parse("fsdp=8").make()))
"""
RUN = """
import sys
import jax
from jaxmoe.checkpoint.store import load
from jaxmoe.eval.logits import greedy_answer
from jaxmoe.mesh import MeshConfig
mesh = MeshConfig().make()
config, params = load(sys.argv[1], mesh)
with jax.set_mesh(mesh):
    greedy_answer(config, params, range(1, 17), 4)
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand and its flags."""
    parser = commands.add_parser(
        "convert", help="converting against cp, loading, running; on this CPU"
    )
    parser.set_defaults(start=run_convert)
    parser.add_argument("--output", metavar="FILE.json", help="where to write the figures")
    parser.add_argument("--folder", help="for 24 GB of files; default: the system's")
    parser.add_argument("--rounds", type=int, default=3, help="cp and each conversion, in turn")


def run_convert(args: argparse.Namespace) -> None:
    """Measures, writes the figures and prints them."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = benchmark_convert(Path(folder), args.rounds)
    write_json(args.output, figures)
    Console().print(convert_table(figures))


def benchmark_convert(folder: Path, rounds: int) -> dict:
    """Measures everything in one run, with the source in the page cache.

    Args:
        folder: an empty folder for 24 GB of files.
        rounds: how often each command runs; figures are medians.
    """
    nbytes = write_source(folder / "hf")
    commands = {
        "cp": ["cp", "-r"],
        "cp, sync": ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"'],  # conversion syncs too
        "convert": CONVERT,
        "convert --weights int8": [*CONVERT, "--weights=int8"],
        "convert --weights int4": [*CONVERT, "--weights=int4"],
    }
    runs = rounds * len(commands) + 2 * (len(commands) - len(COPIES))
    with task_progress("Measuring", runs, "runs") as advance:
        measured = [_convert_round(commands, i, folder, advance) for i in range(rounds)]
        made = {name: _output(folder, name) for name in commands if name not in COPIES}
        used = {
            use: {name: _use(code, checkpoint, advance) for name, checkpoint in made.items()}
            for use, code in (("loads", LOAD), ("answers", RUN))
        }
    summary = {
        name: {
            "seconds": statistics.median(x[name][0] for x in measured),
            "peak_bytes": max(x[name][1] for x in measured),
        }
        for name in commands
    }
    run = {"date": today(), "versions": versions(), "rounds": rounds, "bytes": nbytes}
    bare = bare_interpreter()
    return {"run": run, "bare_interpreter_bytes": bare, "ways": summary} | used


def _convert_round(
    commands: dict[str, list], first: int, folder: Path, advance: Callable[[int], None]
) -> dict[str, tuple[float, int]]:
    """Runs each command once, starting with number `first`; (seconds, peak bytes) by name.

    Outputs of conversions are kept for loading, copies are deleted.
    """
    measured, order = {}, list(commands.items())
    for i in range(len(order)):
        name, command = order[(first + i) % len(order)]
        output = _output(folder, name)
        shutil.rmtree(output, ignore_errors=True)
        measured[name] = measure([*command, folder / "hf", output])
        advance(1)
        if name in COPIES:
            shutil.rmtree(output)
    return measured


def _output(folder: Path, name: str) -> Path:
    return folder / re.sub(r"\W", "", name)


def _use(code: str, checkpoint: Path, advance: Callable[[int], None]) -> dict[str, float]:
    """Runs code on a checkpoint in a new process: the checkpoint's bytes, seconds, peak bytes."""
    seconds, peak = measure([sys.executable, "-c", code, checkpoint])
    advance(1)
    return {"bytes": size_of(checkpoint), "seconds": seconds, "peak_bytes": peak}


def measure(command: list) -> tuple[float, int]:
    """Runs a command; returns its seconds and its peak resident memory in bytes.

    The disk is synced first, so that earlier processes' writes do not slow it down.
    """
    os.sync()
    start = time.perf_counter()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [str(word) for word in command],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: {command[:2]} failed with exit code {process.returncode}.")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def bare_interpreter() -> int:
    """Peak resident bytes of a bare Python process, as its /proc/self/status says.

    `measure` cannot be used: a child's peak starts at the size of the process that forked it.
    """
    code = "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return int(done.stdout) * 1024


def write_source(folder: Path) -> int:
    """Writes a Hugging Face checkpoint of LAYERS layers of Scout with random values.

    Returns the bytes of its tensors.
    """
    folder.mkdir()
    config = dataclasses.replace(SCOUT, layers=layer_kinds(LAYERS), vocab_size=VOCAB)
    mapping = to_hf(config, "bfloat16") | {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(mapping))
    rows = names.TEXT + names.FUSED + names.LAST
    groups = expand(rows, array_shapes(from_hf(mapping, "mapping"), {}))
    shapes = {name: shape for group in groups for name, shape in group.tensors.items()}
    fields, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        fields[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(fields).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        _write_numbers(file, end)
    return end


def _write_numbers(file, nbytes: int) -> None:
    """Writes random bfloat16 numbers with magnitudes from 0.002 to 2."""
    numbers = np.random.default_rng(0)
    while nbytes:
        bits = numbers.integers(0, 2**16, 2**23, np.uint16)
        part = ((bits & 0x83FF) | 0x3B00).astype("<u2").tobytes()[:nbytes]
        file.write(part)
        nbytes -= len(part)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def convert_table(figures: dict) -> Table:
    """A table of the figures, as in the README."""
    table = Table()
    for column in ("", "GB/s", "of cp, sync", "peak memory, GB"):
        table.add_column(column, justify="left" if not column else "right")
    nbytes, cp = figures["run"]["bytes"], figures["ways"]["cp, sync"]["seconds"]
    for name, run in figures["ways"].items():
        rate, part = nbytes / run["seconds"] / 1e9, cp / run["seconds"]
        peak = f"{run['peak_bytes'] / 1e9:.2f}" if name in figures["loads"] else ""
        table.add_row(name, f"{rate:.2f}", f"{part:.2f}", peak)
    for name, run in figures["loads"].items():
        rate = run["bytes"] / run["seconds"] / 1e9
        part = run["peak_bytes"] / run["bytes"]
        peak = f"{run['peak_bytes'] / 1e9:.2f}, {part:.2f} of its size"
        table.add_row(f"loading {name} onto 8 devices", f"{rate:.2f}", "", peak)
    for name, run in figures["answers"].items():
        beyond = (run["peak_bytes"] - run["bytes"]) / 1e9
        table.add_row(f"running {name}", "", "", f"{beyond:.2f} beyond the weights")
    return table
