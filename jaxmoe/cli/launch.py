"""How several processes become one program: a scheduler says who they are, or three variables do.

`jax.distributed` does the rest. Each process gets its share of its host's GPUs.
"""

import contextlib
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax

from jaxmoe.cli.gathering import gather
from jaxmoe.errors import UserError
from jaxmoe.processes import is_first, on_first

# The environment variables that say it where no scheduler does; the first may stand alone.
ADDRESS, COUNT, NUMBER = "JAXMOE_COORDINATOR", "JAXMOE_NUM_PROCESSES", "JAXMOE_PROCESS_ID"
CLUSTER = "JAXMOE_CLUSTER"  # `auto` asks JAX to find one, `off` runs each process for itself
HEARTBEAT = "JAXMOE_HEARTBEAT"  # seconds without a sign of life, after which a process is dead
START = "JAXMOE_START_TIMEOUT"  # seconds in which all processes are to come
# Schedulers' variables: how many processes, which one, how many on this host, and which of these.
SCHEDULERS = {
    "SLURM": ("SLURM_NTASKS", "SLURM_PROCID", "", "SLURM_LOCALID"),
    "Open MPI": (
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
}
TPU_HOSTS = "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"  # lists, of Cloud TPU and GKE


class Launch(NamedTuple):
    """This process among those of one program.

    Attributes:
        by: what says so.
        count: how many processes there are; None where JAX finds out.
        number: this one's, from 0; None where JAX finds out.
        address: HOST:PORT of the first; None where JAX finds out.
        on_host: how many of them are on this host; None if unknown.
        local: this one's number among these; None if unknown.
    """

    by: str
    count: int | None = None
    number: int | None = None
    address: str | None = None
    on_host: int | None = None
    local: int | None = None


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """This process's place among several, by the environment; None for a process alone.

    Raises:
        UserError: for variables that are set in part or wrongly.
    """
    if environment.get(CLUSTER) == "off":
        return None
    address = environment.get(ADDRESS)
    given = [environment.get(name, "") for name in (COUNT, NUMBER)]
    if address and all(text.isdecimal() for text in given):
        return Launch(ADDRESS, int(given[0]), int(given[1]), address)
    found = None if any(given) else _scheduled(environment)
    if found is not None and (found.count or 2) > 1:
        return found._replace(address=address or found.address)
    under_scheduler = found is not None or "SLURM_JOB_ID" in environment
    if any(given) or (address and not under_scheduler):
        raise UserError(
            f"{', '.join((ADDRESS, COUNT, NUMBER))} are to be set together: HOST:PORT of the first "
            "process, how many processes there are, and this one's number from 0; under SLURM and "
            f"Open MPI {ADDRESS} alone does. Or unset all of them."
        )
    return None


def is_spare() -> bool:
    """Whether this process leaves a command of one process to the first of several."""
    launch = find_launch()
    return launch is not None and bool(launch.number)


def _scheduled(environment: Mapping[str, str]) -> Launch | None:
    for by, names in SCHEDULERS.items():
        count, number, on_host, local = (environment.get(name, "") for name in names)
        if by == "SLURM":  # outside of srun there is no step
            count = count if "SLURM_STEP_NODELIST" in environment else ""
            on_host = _tasks_here(environment)
        if count.isdecimal() and number.isdecimal():
            return Launch(by, int(count), int(number), None, _number(on_host), _number(local))
    hosts = (environment.get(name, "") for name in TPU_HOSTS)
    if any("," in names for names in hosts) or environment.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return Launch("Cloud TPU")
    return Launch("JAX") if environment.get(CLUSTER) == "auto" else None


def _tasks_here(environment: Mapping[str, str]) -> str:
    """How many tasks of a SLURM step run on this node: of "2(x3),1" on node 3 it is 1."""
    tasks: list[str] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        each, _, times = part.partition("(x")
        tasks += [each] * (_number(times.rstrip(")")) or 1)
    node = _number(environment.get("SLURM_NODEID", ""))
    return tasks[node] if node is not None and node < len(tasks) else ""


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def join(launch: Launch) -> None:
    """Forms one program with the other processes; afterwards the first one alone speaks.

    Raises:
        UserError: if they do not come, or are not of the same kind.
    """
    gpus, patience = local_gpus(launch, gpus_here()), seconds(START, 300)
    known = None not in (launch.address, launch.count, launch.number)
    if known:
        gather(launch.address or "", launch.count or 0, launch.number or 0, patience)
    failed = (
        f"the processes that {launch.by} speaks of did not become one program ({{}}); start all of "
        f"them within {patience} s, or set {ADDRESS} to a HOST:PORT that they all reach."
    )
    try:
        with _limited(patience, failed.format("some did not come")):
            jax.distributed.initialize(
                launch.address,
                launch.count,
                launch.number,
                gpus,
                cluster_detection_method="deactivate" if known else None,
                heartbeat_timeout_seconds=seconds(HEARTBEAT, 10),
                initialization_timeout=2 * patience,  # at which JAX would end it with a stack
            )
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(failed.format(reason)) from None
    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))  # JAX's own
    if not is_first():
        _be_silent()
    _check_equal()


@contextlib.contextmanager
def _limited(patience: int, sentence: str) -> Iterator[None]:
    """Ends the process if what is within takes longer; JAX itself would abort."""

    def end() -> None:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        os._exit(os.EX_UNAVAILABLE)

    timer = threading.Timer(patience, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def seconds(name: str, default: int, least: int = 1) -> int:
    """The whole number that an environment variable gives, or the default.

    Raises:
        UserError: if it gives another text, or a number below `least`.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text} is no whole number of seconds from {least} on.")
    return int(text)


def gpus_here(environment: Mapping[str, str] = os.environ) -> int:
    """How many NVIDIA GPUs this process may use, found without starting JAX."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len(list(filter(None, visible.split(","))))
    return sum(path.name[6:].isdecimal() for path in Path("/dev").glob("nvidia*"))


def local_gpus(launch: Launch, gpus: int) -> list[int]:
    """The GPUs of this process among those that it sees; none listed means all.

    JAX by itself gives one process a node its first GPU, and says nothing.

    Raises:
        UserError: if the host's processes cannot share them evenly.
    """
    if not launch.on_host or launch.local is None or gpus < 2 or launch.on_host == 1:
        return []  # a scheduler that gives each process one GPU has shared them already
    share, left = divmod(gpus, launch.on_host)
    if left or not share:
        raise UserError(
            f"{launch.by} starts {launch.on_host} processes on a host of {gpus} GPUs, which they "
            f"cannot share evenly; start 1 or {gpus} a host."
        )
    return list(range(launch.local * share, (launch.local + 1) * share))


def _be_silent() -> None:
    """Sends what this process prints nowhere; errors go to `sys.__stderr__`."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # stays open until the process ends


def _check_equal() -> None:
    """Refuses processes of other versions or commands, which would wait for each other forever."""
    here, total, count = jax.local_device_count(), jax.device_count(), jax.process_count()
    if here * count != total:
        raise UserError(
            f"this process has {here} of {total} devices, which {count} processes do not share "
            "evenly; give all the same."
        )
    mine = [metadata.version("jaxmoe"), jax.__version__, sys.argv[1:]]
    said = hashlib.sha256(repr(mine).encode()).hexdigest()
    if on_first(lambda: said) != said:
        raise UserError(
            f"this process has jaxmoe {mine[0]}, jax {mine[1]} and the arguments {mine[2]}, and "
            "process 0 has others; start all in the same way."
        )
