"""A process of the oracle's environment, which answers requests of tests."""

import json
import os
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def ask_oracle():
    """A function that sends a request (see server.py) and waits until it is done."""
    python = os.environ.get("JAXMOE_ORACLE_PYTHON")
    if not python:
        pytest.fail("JAXMOE_ORACLE_PYTHON is not set; run `make oracle`, which sets it")
    command = [python, str(Path(__file__).with_name("server.py"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:

        def ask(request):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            assert not answer, answer

        yield ask
        process.stdin.close()
