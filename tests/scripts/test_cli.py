"""How scripts end: by what the user can mend in one line, whatever stdout is."""

import subprocess
import sys

from tests.scripts import FOLDER


def test_a_closed_stdout_is_no_traceback():
    command = f"'{sys.executable}' -c 'from _cli import run; run(lambda: print(1))' >&-"
    done = subprocess.run(["sh", "-c", command], cwd=FOLDER, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
