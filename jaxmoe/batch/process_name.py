"""Names of processes, by which another process of the same machine sees that one has ended."""

import hashlib
import os
import socket
from pathlib import Path


def process_name() -> str:
    """This process's name, for `has_ended` in any other."""
    pid = os.getpid()
    return f"{_machine()}-{pid}-{_started(pid)}"


def has_ended(name: str) -> bool:
    """Whether a process of this machine with that name is gone; False where none can tell."""
    machine, _, rest = name.partition("-")
    pid, _, started = rest.partition("-")
    if machine != _machine() or not pid.isdecimal() or not started.isdecimal():
        return False
    return _started(int(pid)) != started


def _machine() -> str:
    """Tells where a process's id means something: the machine, its boot, its container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        ids = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = ids = ""
    return hashlib.sha256(f"{socket.gethostname()} {boot} {ids}".encode()).hexdigest()[:16]


def _started(pid: int) -> str | None:
    """When a process of this machine began; None if it has ended, or cannot be looked at."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else rest[18]
