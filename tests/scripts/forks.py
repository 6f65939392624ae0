"""Scripts in processes that are forked from one which has imported what all of them do.

That takes two seconds of a core, which each of some hundred processes would otherwise begin with.
Nothing else is shared: a command's own modules are imported after the fork, and JAX's devices and
threads are made there.
"""

import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The beginnings of names of variables that are read when Python or a package is imported.
READ_EARLY = ("JAX_", "XLA_", "TF_", "PYTHON", "LC_", "LANG")


class Forked:
    """A process, with the methods of `subprocess.Popen` that tests use; its text is in files."""

    def __init__(self, command: list[str], env: dict[str, str]):
        self._folder = tempfile.TemporaryDirectory(prefix="jaxmoe-forked-")
        early = {name: value for name, value in env.items() if name.startswith(READ_EARLY)}
        asked = {"argv": command, "env": env, "cwd": os.getcwd(), "folder": self._folder.name}
        server = _server(tuple(sorted(early.items())))
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        code = Path(self._folder.name, "code")
        if self.returncode is None and code.exists():
            self.returncode = int(code.read_text())
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.005)
        return self.returncode

    def communicate(self, timeout: float = float("inf")) -> tuple[str, str]:
        self.wait(timeout)
        return tuple(Path(self._folder.name, name).read_text() for name in ("out", "err"))

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server(early: tuple[tuple[str, str], ...]) -> subprocess.Popen:
    """The process that others are forked from; it ends with this one, which closes its input."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(READ_EARLY)}
    return subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import serve; serve()"],
        cwd=ROOT, env=kept | dict(early), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def serve() -> None:
    """Forks for each line of the input, and in the fork runs the script that it names."""
    importlib.import_module("jaxmoe.cli.main")
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps those that `_watch`
    for line in sys.stdin:
        asked = json.loads(line)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _watch(asked["folder"])
            _become(asked)
            runpy.run_path(asked["argv"][0], run_name="__main__")
            return


def _watch(folder: str) -> None:
    """Forks: one process says which the other is and writes how it ended, the other returns."""
    pid = os.fork()
    if pid == 0:
        return
    os.write(1, f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    code = Path(folder, "code.new")
    try:
        code.write_text(str(os.waitstatus_to_exitcode(status)))
        code.rename(Path(folder, "code"))
    finally:
        os._exit(0)


def _become(asked: dict) -> None:
    """Takes over the streams, the environment and the folder."""
    names = os.devnull, f"{asked['folder']}/out", f"{asked['folder']}/err"
    for number, name in enumerate(names):
        file = os.open(name, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.argv = asked["argv"]
    sys.path[0] = os.path.dirname(asked["argv"][0])
