"""A conversion that is interrupted anywhere resumes, with the same result to the byte."""

import errno
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import conversion, convert
from jaxmoe.checkpoint.formats import tensor_files
from jaxmoe.checkpoint.formats.safetensors import SafetensorsFolder
from jaxmoe.errors import UserError
from jaxmoe.files.workspace import Resumable
from tests import tiny
from tests.checkpoint.sources import CONFIG, ROOT, checkpoint, weights
from tests.conftest import one_device


def interrupted_at(part, error=KeyboardInterrupt):
    """A progress function that interrupts after this fraction of all bytes."""

    def interrupt(done, total):
        if done > part * total:
            raise error

    return interrupt


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_conversion_goes_on(tmp_path, small_blocks, error):
    source = checkpoint(tmp_path / "hf")
    convert(source, tmp_path / "once")
    for part in (0.2, 0.6, 0.9):
        with pytest.raises(error):
            convert(source, tmp_path / "out", interrupted_at(part, error))
        assert not (tmp_path / "out").exists()
        for folder in ("out.partial", "out.partial/arrays", "out.partial/result"):
            with pytest.raises(UserError, match="no finished checkpoint"):
                store.read_config(tmp_path / folder)
    seen = []
    report = convert(source, tmp_path / "out", lambda *step: seen.append(step))
    largest = max(tensor.nbytes for tensor in weights().values())
    assert seen[0][0] == report.resumed > 0.9 * report.nbytes - largest
    assert files(tmp_path / "out") == files(tmp_path / "once")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "once", "out"]


@pytest.mark.parametrize("weights", [None, "int8"])
def test_power_lost_what_was_noted(tmp_path, small_blocks, monkeypatch, weights):
    """After a reboot, arrays that were not synced are read, and made again if they are damaged."""
    source = checkpoint(tmp_path / "hf")
    whole = convert(source, tmp_path / "once", weights=weights)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", interrupted_at(0.8), weights=weights)
    written = (tmp_path / "out.partial/arrays").rglob("c/**/*")
    written = sorted(path for path in written if path.is_file())
    damaged = written[len(written) // 3]
    damaged_size = damaged.stat().st_size
    os.truncate(damaged, damaged_size // 2)
    monkeypatch.setattr(conversion, "boot", lambda: "another")
    seen = []
    report = convert(source, tmp_path / "out", lambda done, _: seen.append(done), weights=weights)
    assert 0.2 * whole.nbytes < report.resumed < 0.8 * whole.nbytes - damaged_size
    assert seen == sorted(seen) and seen[0] < report.resumed < seen[-1]
    assert report.errors == whole.errors
    assert files(tmp_path / "out") == files(tmp_path / "once")


@pytest.mark.parametrize("change", ["weights", "config", "numbers"])
def test_another_conversion_was_interrupted(tmp_path, change):
    source = checkpoint(tmp_path / "hf")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", interrupted_at(0.5))
    left = files(tmp_path / "out.partial")
    options = {"weights": "int8"} if change == "weights" else {}
    if change == "config":
        checkpoint(tmp_path / "hf", {**CONFIG, "rope_theta": 7.0})
    if change == "numbers":  # as of another training run: headers are equal
        checkpoint(tmp_path / "hf", tensors=tiny.random_tensors(CONFIG, seed=2))
    with pytest.raises(
        UserError, match=r"out\.partial is left from a conversion of another source"
    ):
        convert(source, tmp_path / "out", **options)
    assert files(tmp_path / "out.partial") == left


def killed_at(monkeypatch, owner, name, nth):
    """Interrupts before any call of a file system function after the nth."""
    original, calls = getattr(owner, name), []

    def function(*arguments, **more):
        calls.append(0)
        if len(calls) > nth:
            raise KeyboardInterrupt
        return original(*arguments, **more)

    monkeypatch.setattr(owner, name, function)


@pytest.mark.slow
@pytest.mark.parametrize("owner, name", [(Path, "rename"), (shutil, "rmtree"), (Path, "mkdir")])
def test_killed_between_file_operations(tmp_path, monkeypatch, owner, name):
    """Interrupts at each of them in turn; the conversion resumes, or its output is complete."""
    source = checkpoint(tmp_path / "hf", tiny.maverick_like(num_hidden_layers=2), two())
    convert(source, tmp_path / "once")
    expected = files(tmp_path / "once")
    for nth in range(200):
        output = tmp_path / str(nth)
        with monkeypatch.context() as patch:
            killed_at(patch, owner, name, nth)
            try:
                convert(source, output)
                break
            except KeyboardInterrupt:
                pass
        if not output.exists():
            convert(source, output)
        assert files(output) == expected, nth
    else:
        pytest.fail("more operations than were tried")
    assert nth > 0


def test_two_runs_with_one_output(tmp_path):
    """The second run is refused and does not disturb the first."""
    source = checkpoint(tmp_path / "hf")
    refusals = []

    def second(done, total):
        if not refusals and done > 0.5 * total:
            with pytest.raises(UserError, match=r"out\.partial is being written by another run"):
                convert(source, tmp_path / "out")
            refusals.append(done)

    convert(source, tmp_path / "out", second)
    assert refusals
    convert(source, tmp_path / "once")
    assert files(tmp_path / "out") == files(tmp_path / "once")


def test_two_runs_that_begin_together(tmp_path):
    """If neither finds a workspace, the later one is refused and removes nothing."""
    with Resumable(tmp_path / "out") as one, Resumable(tmp_path / "out") as other:
        one.begin(1)
        (one.path / "arrays").mkdir()
        with pytest.raises(UserError, match=r"out\.partial is being written by another run"):
            other.begin(1)
        one.write_note({"done": []})
        assert sorted(path.name for path in one.path.iterdir()) == ["arrays", "progress.json"]


def test_a_disk_that_fails_at_the_end(tmp_path, monkeypatch):
    """After a failed sync the note is dropped, since a later sync would prove nothing."""
    source = checkpoint(tmp_path / "hf")

    def fails(descriptor):
        if not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            file = os.readlink(f"/proc/self/fd/{descriptor}")
            if "/result/" in file:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(UserError, match=r"out cannot be written: Input/output error"):
            convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"out\.partial is left from an interrupted run; delete"):
        convert(source, tmp_path / "out")


def two():
    return tiny.random_tensors(tiny.maverick_like(num_hidden_layers=2), seed=1)


def test_shard_that_breaks_during_conversion(tmp_path, small_blocks):
    """Finished jobs are kept, and nothing looks like a finished checkpoint."""
    shard = checkpoint(tmp_path / "hf", shards=3) / "model-00003-of-00003.safetensors"
    whole = shard.read_bytes()
    with pytest.raises(UserError, match=rf"{shard.name} ends inside "):
        convert(tmp_path / "hf", tmp_path / "out", lambda *_: os.truncate(shard, 10000))
    assert not (tmp_path / "out").exists()
    shard.write_bytes(whole)
    assert convert(tmp_path / "hf", tmp_path / "out").resumed > 0


class BadSector(io.FileIO):
    """A file that cannot be read in its second half."""

    def readinto(self, buffer):
        if self.tell() > os.fstat(self.fileno()).st_size // 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readinto(buffer)


def test_read_error_in_the_middle(tmp_path, small_blocks, monkeypatch):
    """The error names file and tensor, and a run with a repaired disk resumes."""
    source = checkpoint(tmp_path / "hf", shards=3)
    convert(source, tmp_path / "once")
    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "open", lambda file, *_, **__: BadSector(file), raising=False)
        found = SafetensorsFolder(source).tensors
        with pytest.raises(UserError) as caught:
            convert(source, tmp_path / "out")
    file, name = re.fullmatch(
        r"(\S+) cannot be read at (\S+) \(Input/output error\); .* run again\.", str(caught.value)
    ).groups()
    assert str(found[name].file) == file
    assert not (tmp_path / "out").exists()
    assert convert(source, tmp_path / "out").resumed > 0
    assert files(tmp_path / "out") == files(tmp_path / "once")


def test_killed_conversion_goes_on(tmp_path, small_blocks):
    """Kills the process twice; `test_kills.py` does so at random times."""
    source = checkpoint(tmp_path / "hf")
    convert(source, tmp_path / "once")
    code = (
        "import os, signal, sys; from jaxmoe.checkpoint.convert import convert;"
        "kill = lambda done, total: done > float(sys.argv[3]) * total"
        " and os.kill(os.getpid(), signal.SIGKILL);"
        "convert(sys.argv[1], sys.argv[2], kill)"
    )
    for part in ("0.1", "0.5"):
        command = [sys.executable, "-c", code, source, tmp_path / "out", part]
        killed = subprocess.run(command, cwd=ROOT, check=False)
        assert killed.returncode == -9
        assert not (tmp_path / "out").exists()
    assert convert(source, tmp_path / "out").resumed > 0
    assert_same_arrays(tmp_path / "out", tmp_path / "once")


def assert_same_arrays(got, expected):
    """Files written in blocks of other sizes have the same content, and other bytes."""
    (_, one), (_, two) = store.load(got, one_device()), store.load(expected, one_device())
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
