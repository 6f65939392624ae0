"""How scripts end: by what the user can mend in one line, whatever stdout is."""

import subprocess
import sys

import pytest

from jaxmoe.cli import terminal
from tests.scripts import FOLDER


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"), "9 bytes"),
        (MemoryError(), "the memory does not suffice"),
    ],
)
def test_too_little_memory_is_one_sentence(capsys, error, words):
    """Catches the traceback that a model too large for its devices ends with."""

    def main():
        raise error

    with pytest.raises(SystemExit, match="1"):
        terminal.run(main)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


def test_other_errors_of_jax_stay_what_they_are():
    def main():
        raise RuntimeError("INTERNAL: no")

    with pytest.raises(RuntimeError, match="INTERNAL"):
        terminal.run(main)


def test_a_closed_stdout_is_no_traceback():
    command = (
        f"'{sys.executable}' -c 'from jaxmoe.cli.terminal import run; run(lambda: print(1))' >&-"
    )
    done = subprocess.run(["sh", "-c", command], cwd=FOLDER.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
