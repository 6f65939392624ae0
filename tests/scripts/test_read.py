"""read.py: a long text is read, killed, continued, and asked about, as a user would."""

import signal
import time
from pathlib import Path

import pytest

from jaxmoe.checkpoint.convert import convert
from jaxmoe.eval.needle import HAYSTACK, NEEDLE, QUESTION
from tests.scripts import refuses, succeeds, together

MODEL = Path(__file__).parents[2] / "demo/needle/model"
SEES = Path(__file__).parents[2] / "demo/vision"
KEY = "60718"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("read")
    convert(MODEL, folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture
def text(tmp_path):
    """Three chunks and a part of one, with the key in the first."""
    path = tmp_path / "text.txt"
    path.write_text(HAYSTACK * 30 + NEEDLE.format(key=KEY) + HAYSTACK * 330)
    return path


def kill_after_a_save(workspace, *command):
    """Starts a command, and kills it once its workspace has something to go on from."""
    process = together.start(*command)
    deadline = time.monotonic() + 300
    while '"saved": 8192' not in _read(workspace / "progress.json"):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def _read(path):
    return path.read_text() if path.exists() else ""


def test_a_folder_of_pictures(tmp_path):
    convert(SEES / "model", tmp_path / "checkpoint")
    output = ("--output", tmp_path / "saved")
    told = succeeds("read.py", tmp_path / "checkpoint", SEES / "held-out", *output)[1]
    tiles = {"1x2.png": (1, 2), "2x2.png": (2, 2), "3x1.png": (3, 1)}
    layouts = [3 + 4 * (rows * columns + 1) + rows * columns for rows, columns in tiles.values()]
    assert f"Read {1 + sum(layouts)} tokens" in told
    asked = ("--prompt", "What", "--max-new-tokens", 2, "--document", tmp_path / "saved")
    succeeds("generate.py", tmp_path / "checkpoint", *asked)


def test_pictures_for_a_model_that_does_not_see(checkpoint, tmp_path):
    output = ("--output", tmp_path / "saved")
    refuses("read.py", checkpoint, SEES / "held-out", *output, words=("no vision tower",))
    assert not (tmp_path / "saved").exists()


@pytest.mark.slow
def test_killed_continued_and_asked(checkpoint, text, tmp_path):
    command = ("read.py", checkpoint, text, "--output", tmp_path / "saved", "--save-every", 8192)
    kill_after_a_save(tmp_path / "saved.partial", *command)
    assert not (tmp_path / "saved").exists()
    mesh = ("--mesh", "sequence=2", "--cpu-devices", 2)
    told = succeeds(*command, *mesh)[1]
    assert ", 8192 of them before" in told or ", 16384 of them before" in told
    asked = ("--prompt", QUESTION, "--max-new-tokens", 8, "--temperature", 0)
    answer, _ = succeeds("generate.py", checkpoint, "--document", tmp_path / "saved", *asked)
    assert answer.strip().startswith(KEY)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--segment", 0), ["--prefill-chunk 0 is below 1"]),
        (("--save-every", 0), ["--save-every 0 is below 1"]),
        (("--output", "{folder}"), ["exists and is not empty"]),
    ],
)
def test_bad_flags(checkpoint, text, tmp_path, flags, words):
    flags = [str(flag).format(folder=tmp_path) for flag in flags]
    refuses("read.py", checkpoint, text, "--output", tmp_path / "saved", *flags, words=words)


@pytest.mark.parametrize("content, words", [(b"", ["is empty"]), (b"\xff", ["is no UTF-8"])])
def test_bad_texts(checkpoint, tmp_path, content, words):
    (tmp_path / "bad.txt").write_bytes(content)
    args = (checkpoint, tmp_path / "bad.txt", "--output", tmp_path / "saved")
    refuses("read.py", *args, words=["bad.txt", *words])


def test_a_document_brings_its_own_cache(checkpoint, tmp_path):
    args = (checkpoint, "--document", tmp_path, "--prompt", "x", "--kv", "int8")
    refuses("generate.py", *args, words=["--document brings its own cache"])


def test_no_document(checkpoint, tmp_path):
    args = (checkpoint, "--document", tmp_path, "--prompt", "x")
    refuses("generate.py", *args, words=["is no finished checkpoint", "jaxmoe read"])
