"""Says what each process of a program sees, and how fast the axes of its mesh are.

Start it as the program itself will be started. The exit code is 1 if something is wrong.
"""

import argparse
import functools
import os
import secrets
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from rich.console import Console
from rich.table import Table

from jaxmoe.cli import devices, launch
from jaxmoe.errors import UserError
from jaxmoe.processes import from_all, on_first

SIZES = {"cpu": 1 << 20}  # bytes that a device sends to measure a rate, by platform
LARGE = 64 << 20
REPEATS = 5
PROXIES = ("http_proxy", "https_proxy", "grpc_proxy")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mesh", metavar="SPEC", help="as of the other commands")
    parser.add_argument("--cpu-devices", type=int, metavar="N", help="as of the other commands")
    parser.add_argument(
        "--shared", metavar="FOLDER", help="a folder that all hosts are to see, as for checkpoints"
    )
    return parser


def main() -> None:
    """Runs the command."""
    args = make_parser().parse_args()
    mesh = devices.start(args)
    hosts = from_all(seen())
    console = Console()
    console.print(hosts_table(hosts))
    console.print(axes_table(mesh))
    wrong = mistakes(hosts) + (unshared(args.shared) if args.shared else [])
    if wrong:
        raise UserError(" ".join(wrong))


def seen() -> dict[str, Any]:
    """What this process sees."""
    device = jax.local_devices()[0]
    found = launch.find_launch()
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "by": found.by if found is not None else "alone",
        "devices": jax.local_device_count(),
        "kind": device.device_kind,
        "memory": (device.memory_stats() or {}).get("bytes_limit", 0),
        "gpus": launch.gpus_here() if device.platform != "cpu" else 0,
        "proxies": [name for name in PROXIES if os.environ.get(name)],
    }


def hosts_table(hosts: list[dict[str, Any]]) -> Table:
    """A row for each process."""
    total = sum(host["devices"] for host in hosts)
    table = Table(title=f"{len(hosts)} processes, {total} devices, jax {jax.__version__}")
    for column in ("process", "host", "pid", "started by", "devices", "kind", "GB each"):
        table.add_column(column)
    for number, host in enumerate(hosts):
        words = (number, host["host"], host["pid"], host["by"], host["devices"], host["kind"])
        table.add_row(*map(str, words), f"{host['memory'] / 1e9:.1f}" if host["memory"] else "")
    return table


def axes_table(mesh: jax.sharding.Mesh) -> Table:
    """An all-reduce over each axis of the mesh that has several devices."""
    table = Table(title="All-reduce over each axis")
    for column in ("axis", "devices", "hosts", "one number, us", "GB/s a device"):
        table.add_column(column, justify="right" if column != "axis" else "left")
    size = SIZES.get(mesh.devices.flat[0].platform, LARGE)
    for axis, count in mesh.shape.items():
        if count > 1:
            short, long = (all_reduce_seconds(mesh, axis, n) for n in (4, size))
            sent = 2 * (count - 1) / count * size  # of a ring
            across = hosts_across(mesh, axis)
            words = (str(count), str(across), f"{short * 1e6:.0f}", f"{sent / long / 1e9:.2f}")
            table.add_row(axis, *words)
    return table


def hosts_across(mesh: jax.sharding.Mesh, axis: str) -> int:
    """How many processes the devices along an axis belong to."""
    place = mesh.axis_names.index(axis)
    line = mesh.devices[tuple(slice(None) if i == place else 0 for i in range(mesh.devices.ndim))]
    return len({device.process_index for device in line})


def all_reduce_seconds(mesh: jax.sharding.Mesh, axis: str, nbytes: int) -> float:
    """The median time of an all-reduce of so many bytes on each device."""
    everywhere = PartitionSpec(mesh.axis_names)
    with jax.set_mesh(mesh):
        reduce = functools.partial(jax.lax.psum, axis_name=axis)
        run = jax.jit(jax.shard_map(reduce, in_specs=everywhere, out_specs=everywhere))
        make = jax.jit(
            functools.partial(jnp.ones, (mesh.size, nbytes // 4)),
            out_shardings=jax.sharding.NamedSharding(mesh, everywhere),
        )
        x = make()
        sums = np.asarray(run(x).addressable_shards[0].data)  # compiled by this first call
        if sums.flat[0] != mesh.shape[axis]:
            raise UserError(f"an all-reduce over {axis} gives a wrong sum: the network is faulty.")
        return statistics.median(_seconds(run, x) for _ in range(REPEATS))


def _seconds(run: Any, x: jax.Array) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(x))
    return time.perf_counter() - start


def mistakes(hosts: list[dict[str, Any]]) -> list[str]:
    """Sentences on what is wrong with the processes."""
    found = []
    if len({host["devices"] for host in hosts}) > 1:
        found.append("The processes have different numbers of devices; give all the same.")
    for name in sorted({host["host"] for host in hosts}):
        here = [host for host in hosts if host["host"] == name]
        used, there = sum(host["devices"] for host in here), max(host["gpus"] for host in here)
        if there and used != there:
            found.append(
                f"{name} has {there} GPUs, and its {len(here)} processes take {used}; start one "
                "process a host, or give each its own by CUDA_VISIBLE_DEVICES."
            )
    names = sorted({name for host in hosts for name in host["proxies"]})
    if names and len(hosts) > 1:
        found.append(f"{', '.join(names)} may keep the processes apart; unset them.")
    return found


def unshared(folder: str) -> list[str]:
    """A sentence if some process does not see what the first one writes into a folder."""
    token, place = secrets.token_hex(8), Path(folder) / ".jaxmoe-doctor"
    token = on_first(lambda: place.write_text(token) and token)
    see = from_all(place.exists() and place.read_text() == token)
    on_first(place.unlink)
    blind = [number for number, sees in enumerate(see) if not sees]
    return [f"{folder} is another folder for process {number}; mount it." for number in blind]
