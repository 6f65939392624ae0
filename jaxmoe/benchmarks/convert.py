"""`jaxmoe benchmark convert`: rate and peak memory beside `cp`, of loading and running."""

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
from jaxmoe.checkpoint import names
from jaxmoe.checkpoint.tensors import array_shapes, expand
from jaxmoe.cli.terminal import task_progress
from jaxmoe.config import SCOUT, layer_kinds
from jaxmoe.hf_config import from_hf, to_hf

CONVERT = [sys.executable, "-m", "jaxmoe", "convert"]
COPIES = ("cp", "cp, sync")
LAYERS, VOCAB = 1, 65536  # of Scout's shapes: 6 GB
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
        "convert", help="converting beside cp, loading, running; on this CPU"
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
    """All of it in one run; the source lies in the page cache for all."""
    nbytes = write_source(folder / "hf")
    ways = {
        "cp": ["cp", "-r"],
        "cp, sync": ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"'],  # converting ends synced, too
        "convert": CONVERT,
        "convert --weights int8": [*CONVERT, "--weights=int8"],
        "convert --weights int4": [*CONVERT, "--weights=int4"],
    }
    runs = rounds * len(ways) + 2 * (len(ways) - len(COPIES))
    with task_progress("Measuring", runs, "runs") as advance:
        found = [_convert_round(ways, i, folder, advance) for i in range(rounds)]
        made = {way: _kept(folder, way) for way in ways if way not in COPIES}
        used = {
            name: {way: _use(code, checkpoint, advance) for way, checkpoint in made.items()}
            for name, code in (("loads", LOAD), ("answers", RUN))
        }
    summary = {
        way: {
            "seconds": statistics.median(each[way][0] for each in found),
            "peak_bytes": max(each[way][1] for each in found),
        }
        for way in ways
    }
    run = {"date": today(), "versions": versions(), "rounds": rounds, "bytes": nbytes}
    bare = bare_interpreter()
    return {"run": run, "bare_interpreter_bytes": bare, "ways": summary} | used


def _convert_round(
    ways: dict[str, list], first: int, folder: Path, advance: Callable[[int], None]
) -> dict[str, tuple[float, int]]:
    """Each way once, a different one first each time; what the conversions made is kept."""
    measured, order = {}, list(ways.items())
    for i in range(len(order)):
        way, command = order[(first + i) % len(order)]
        output = _kept(folder, way)
        shutil.rmtree(output, ignore_errors=True)
        measured[way] = measure([*command, folder / "hf", output])
        advance(1)
        if way in COPIES:
            shutil.rmtree(output)
    return measured


def _kept(folder: Path, way: str) -> Path:
    return folder / re.sub(r"\W", "", way)


def _use(code: str, checkpoint: Path, advance: Callable[[int], None]) -> dict[str, float]:
    """What a process of its own takes to load a checkpoint, and perhaps to run it."""
    seconds, peak = measure([sys.executable, "-c", code, checkpoint])
    advance(1)
    return {"bytes": size_of(checkpoint), "seconds": seconds, "peak_bytes": peak}


def measure(command: list) -> tuple[float, int]:
    """Seconds, and the peak of resident memory in bytes, of a process.

    What earlier ones wrote is on disk before it starts, and no longer in its way.
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
    """Peak of Python alone, as it says itself: what `measure` sees begins with this process's."""
    code = "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return int(done.stdout) * 1024


def write_source(folder: Path) -> int:
    """Scout's tensors of fewer layers, of random numbers; returns their bytes."""
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
    """bfloat16 numbers between 0.002 and 2, of either sign."""
    numbers = np.random.default_rng(0)
    while nbytes:
        bits = numbers.integers(0, 2**16, 2**23, np.uint16)
        part = ((bits & 0x83FF) | 0x3B00).astype("<u2").tobytes()[:nbytes]
        file.write(part)
        nbytes -= len(part)


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def convert_table(figures: dict) -> Table:
    """As the README has it."""
    table = Table()
    for column in ("", "GB/s", "of cp, sync", "peak memory, GB"):
        table.add_column(column, justify="left" if not column else "right")
    nbytes, cp = figures["run"]["bytes"], figures["ways"]["cp, sync"]["seconds"]
    for way, found in figures["ways"].items():
        rate, part = nbytes / found["seconds"] / 1e9, cp / found["seconds"]
        peak = f"{found['peak_bytes'] / 1e9:.2f}" if way in figures["loads"] else ""
        table.add_row(way, f"{rate:.2f}", f"{part:.2f}", peak)
    for way, found in figures["loads"].items():
        rate = found["bytes"] / found["seconds"] / 1e9
        part = found["peak_bytes"] / found["bytes"]
        peak = f"{found['peak_bytes'] / 1e9:.2f}, {part:.2f} of its size"
        table.add_row(f"loading {way} onto 8 devices", f"{rate:.2f}", "", peak)
    for way, found in figures["answers"].items():
        beyond = (found["peak_bytes"] - found["bytes"]) / 1e9
        table.add_row(f"running {way}", "", "", f"{beyond:.2f} beyond the weights")
    return table
