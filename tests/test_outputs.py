"""Output files appear whole, are written by one process at a time, and replace no device."""

import contextlib
import errno
import io
import os
import stat
import sys
import threading

import pytest

from jaxmoe.errors import UserError
from jaxmoe.files import atomic, outputs
from jaxmoe.files.outputs import check_writable, write_file, write_json


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old, and longer than what is new")
    write_json(file, {"ä": 1})
    assert file.read_text() == '{\n "ä": 1\n}\n'
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_is_followed(tmp_path):
    """Catches a rename that replaces a link."""
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to("there/file")
    write_file(link, "x")
    assert link.is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "x"


def test_a_pipe_stays_a_pipe(tmp_path):
    """Catches a rename over a pipe or a device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_file(pipe, "x")
    reader.join()
    assert read == [b"x"] and stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1"])
def test_standard_output_by_its_names(capfd, name):
    write_file(name, "x")
    assert capfd.readouterr().out == "x"


@pytest.mark.parametrize("path", ["", "missing/file", "n" * 300, "a\0b"])
def test_what_cannot_be_written_is_named(tmp_path, path):
    for write in (check_writable, lambda place: write_file(place, "x")):
        with pytest.raises(UserError) as error:
            write(f"{tmp_path}/{path}")
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_two_runs_do_not_write_one_file(tmp_path):
    file = tmp_path / "a"
    with outputs.locked(file) as (_, partial):
        for write in (check_writable, lambda place: write_file(place, "x")):
            with pytest.raises(UserError, match="is being written by another run"):
                write(file)
    assert not partial.exists()
    write_file(file, "x")


def test_a_file_that_another_run_has_just_renamed_is_not_taken(tmp_path, monkeypatch):
    """Catches a lock of the file that the other run has finished."""
    file, flock = tmp_path / "a", atomic.fcntl.flock

    def late(descriptor, how):
        (tmp_path / "a.partial").rename(file)
        flock(descriptor, how)

    monkeypatch.setattr(atomic.fcntl, "flock", late)
    with pytest.raises(UserError, match="was written by another run a moment ago"):
        write_file(file, "x")


def test_another_run_that_begins_meanwhile_keeps_its_file(tmp_path):
    """Catches a run that removes the file that the next run has just begun."""
    file = tmp_path / "a"
    with outputs.locked(file) as (stream, partial):
        stream.write(b"x")
        atomic.publish(stream, partial, file)
        partial.touch()
    assert partial.exists()


@pytest.mark.parametrize("stdout", [None, io.StringIO()])
def test_without_a_standard_output_that_is_a_file(tmp_path, monkeypatch, stdout):
    """Catches an error if stdout is closed or a notebook's, although nothing is written to it."""
    monkeypatch.setattr(sys, "stdout", stdout)
    for _ in range(2):
        write_file(tmp_path / "a", "x")
    monkeypatch.setattr(outputs.os, "fstat", closed(os.fstat))
    write_file(tmp_path / "a", "y")
    assert (tmp_path / "a").read_text() == "y"


def closed(fstat):
    def without_stdout(descriptor):
        if descriptor == 1:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return fstat(descriptor)

    return without_stdout


def test_a_full_disk_is_one_sentence_and_keeps_the_old(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "a"
    file.write_text("old")
    monkeypatch.setattr(outputs.os, "fsync", full)
    with pytest.raises(UserError, match="a cannot be written: No space left on device"):
        write_file(file, "new")
    assert file.read_text() == "old"


def test_what_is_there_may_be_refused(tmp_path):
    file = tmp_path / "a"
    file.touch()
    check_writable(file, empty=True)
    file.write_text("x")
    check_writable(file)
    with pytest.raises(UserError, match="exists and is not empty"):
        check_writable(file, empty=True)
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "a.partial").unlink()
        raise AssertionError("a check leaves nothing")
