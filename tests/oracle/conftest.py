"""A process of the oracle's environment, which answers requests of tests."""

import contextlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def ask_oracle():
    """A function that sends a request (see server.py) and waits until it is done."""
    with oracle() as ask:
        yield ask


@contextlib.contextmanager
def oracle(**packages):
    """The function of `ask_oracle`.

    Args:
        packages: packages, by name, that are taken in another version than the environment's, from
            a folder in it.
    """
    python = os.environ.get("JAXMOE_ORACLE_PYTHON")
    if not python:
        pytest.fail("JAXMOE_ORACLE_PYTHON is not set; run `make oracle`, which sets it")
    folders = [Path(python).parents[1] / f"{name}-{version}" for name, version in packages.items()]
    found = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [python, str(Path(__file__).with_name("server.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes, text=True, env=found) as process:

        def ask(request):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            assert not answer, answer

        yield ask
        process.stdin.close()


@pytest.fixture
def transformers(ask_oracle):
    """A function that returns the logits and greedy tokens of a checkpoint."""

    def ask(checkpoint, folder, tokens, decode_from):
        request = {"checkpoint": str(checkpoint), "decode_from": decode_from, "greedy": NEW_TOKENS}
        request |= {"tokens": str(folder / "in.npz"), "output": str(folder / "out.npz")}
        np.savez(request["tokens"], tokens=tokens)
        ask_oracle(request)
        with np.load(request["output"]) as answer:
            return dict(answer)

    return ask
