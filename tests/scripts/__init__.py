"""Scripts as a user runs them, each in a process of its own."""

import os
import subprocess
from pathlib import Path

from tests.scripts.forks import Forked

FOLDER = Path(__file__).parents[2] / "scripts"


def run(script, *args):
    words = [str(word) for word in (FOLDER / script, *args)]
    process = Forked(words, dict(os.environ))
    out, err = process.communicate()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def succeeds(script, *args):
    """What the script wrote to stdout and to stderr."""
    done = run(script, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def refuses(script, *args, words):
    """One line that begins with `error: ` and holds `words`, exit code 1, and nothing else."""
    done = run(script, *args)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert all(str(word) in done.stderr for word in words), done.stderr
