"""Answers on stdout are the same bytes with and without terminals, and of any encoding."""

import json
import os
import pty
import subprocess
import sys
import threading
import tty

import pytest

from tests.scripts import FOLDER


def run(args, *, stdout_is_terminal=False, stderr_is_terminal=False, **environment):
    """The bytes on stdout and on stderr."""
    streams = [_stream(stdout_is_terminal), _stream(stderr_is_terminal)]
    command = [sys.executable, str(FOLDER / "generate.py"), *map(str, args)]
    (out, out_end), (err, err_end) = streams
    wide = {"COLUMNS": "40", "TERM": "xterm"}
    process = subprocess.Popen(
        command, stdout=out_end, stderr=err_end, env=os.environ | wide | environment
    )
    os.close(out_end)
    os.close(err_end)
    read: list[bytes] = [b"", b""]
    readers = [
        threading.Thread(target=_read, args=(read, i, end)) for i, end in ((0, out), (1, err))
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert process.wait() == 0, read[1]
    return read


def _stream(is_terminal):
    if not is_terminal:
        return os.pipe()
    main, end = pty.openpty()
    tty.setraw(end)  # bytes as they are written
    return main, end


def _read(read, i, end):
    try:
        while part := os.read(end, 65536):
            read[i] += part
    except OSError:  # how a terminal ends
        pass
    os.close(end)


@pytest.mark.slow
def test_answers_do_not_depend_on_terminals(small, tmp_path):
    """Catches a progress bar that takes, wraps or draws into what is written to stdout."""
    source = tmp_path / "in.jsonl"
    records = [{"id": f"{n} {'long ' * 30}é", "tokens": [n + 1, 7]} for n in range(3)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    args = [small.checkpoint, "--prompts", source, "--max-new-tokens", 8]
    plain, stderr = run(args, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    ids = sorted(json.loads(line)["id"] for line in plain.splitlines())
    assert ids == [record["id"] for record in records]
    assert stderr == b""
    beside, drawn = run(args, stderr_is_terminal=True)
    assert beside == plain and b"tokens/s" in drawn
    on, drawn = run(args, stdout_is_terminal=True, stderr_is_terminal=True)
    assert on == plain and b"Generating" not in drawn
