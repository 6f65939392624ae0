"""`benchmark.py convert`: rate and peak memory of converting and loading, beside `cp`."""

import argparse
import dataclasses
import json
import math
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _bench import today, versions, write_json
from _cli import task_progress
from rich.console import Console
from rich.table import Table

from jaxmoe.checkpoint import names
from jaxmoe.checkpoint.tensors import array_shapes, expand
from jaxmoe.config import SCOUT, layer_kinds
from jaxmoe.hf_config import from_hf, to_hf

SCRIPTS = Path(__file__).parent
LAYERS, VOCAB = 1, 65536  # of Scout's shapes: 6 GB
LOAD = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from jaxmoe.checkpoint.store import load
from jaxmoe.mesh import MeshConfig
jax.block_until_ready(load(sys.argv[1], MeshConfig.parse("fsdp=8").make()))
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("convert", help="converting and loading, beside cp; on this CPU")
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
    source = folder / "hf"
    nbytes = write_source(source)
    ways = {
        "cp": ["cp", "-r"],
        "convert": [sys.executable, SCRIPTS / "convert.py"],
        "convert --weights int8": [sys.executable, SCRIPTS / "convert.py", "--weights=int8"],
    }
    runs: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
    with task_progress("Measuring", rounds * len(ways) + 2, "runs") as advance:
        for _ in range(rounds):
            for way, command in ways.items():
                output = folder / "output"
                runs[way].append(measure([*command, source, output]))
                kept = folder / way.replace(" ", "")
                shutil.rmtree(kept, ignore_errors=True)
                output.rename(kept) if way != "cp" else shutil.rmtree(output)
                advance(1)
        loads = {}
        for way in list(ways)[1:]:
            kept = folder / way.replace(" ", "")
            seconds, peak = measure([sys.executable, "-c", LOAD, kept])
            loads[way] = {"bytes": size_of(kept), "seconds": seconds, "peak_bytes": peak}
            advance(1)
    summary = {
        way: {
            "seconds": statistics.median(seconds for seconds, _ in found),
            "peak_bytes": max(peak for _, peak in found),
        }
        for way, found in runs.items()
    }
    run = {"date": today(), "versions": versions(), "rounds": rounds, "bytes": nbytes}
    bare = bare_interpreter()
    return {"run": run, "bare_interpreter_bytes": bare, "ways": summary, "loads": loads}


def measure(command: list) -> tuple[float, int]:
    """Seconds, and the peak of resident memory in bytes, of a process."""
    start = time.perf_counter()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [str(word) for word in command],
        env=environment,
        stdout=subprocess.DEVNULL,
        cwd=SCRIPTS.parent,
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
    for column in ("", "GB/s", "of cp", "peak memory, GB"):
        table.add_column(column, justify="left" if not column else "right")
    nbytes, cp = figures["run"]["bytes"], figures["ways"]["cp"]["seconds"]
    for way, found in figures["ways"].items():
        rate, part = nbytes / found["seconds"] / 1e9, cp / found["seconds"]
        peak = "" if way == "cp" else f"{found['peak_bytes'] / 1e9:.2f}"
        table.add_row(way, f"{rate:.2f}", f"{part:.2f}", peak)
    for way, found in figures["loads"].items():
        rate = found["bytes"] / found["seconds"] / 1e9
        part = found["peak_bytes"] / found["bytes"]
        peak = f"{found['peak_bytes'] / 1e9:.2f}, {part:.2f} of its size"
        table.add_row(f"loading {way} onto 8 devices", f"{rate:.2f}", "", peak)
    return table
