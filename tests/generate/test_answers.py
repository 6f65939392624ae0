"""The answers of a job: in the order of the requests, and none lost to a kill at any moment."""

import contextlib

import pytest

from jaxmoe.errors import UserError
from jaxmoe.generation import answers as module
from jaxmoe.generation.answers import Answers, encode, job_digest
from jaxmoe.generation.engine import Request
from jaxmoe.generation.jobs import Refusal

LINES = [Request("a", (1,), 9), Refusal(None, "no"), Request(2, (1,), 9), Request("ä", (1,), 9)]
JOB = job_digest([0.5], LINES)
WHOLE = b"".join(
    encode(line.record if isinstance(line, Refusal) else {"id": line.id, "n": str(line.id)})
    for line in LINES
)


class Killed(BaseException):
    """The process ends here."""


def run(path, *, stop_after=None, job=JOB) -> int:
    """Answers what is left, last request first; how many were left."""
    with Answers(path, job, LINES) as answers:
        left = [line for line in LINES if isinstance(line, Request)]
        left = [line for line in left if str(line.id) not in answers.done]
        if answers.complete:
            return 0
        for count, line in enumerate(reversed(left)):
            if count == stop_after:
                raise Killed
            answers.write({"id": line.id, "n": str(line.id)})
        return len(left)


@pytest.mark.parametrize("empty", [False, True])
def test_the_order_is_that_of_the_requests(tmp_path, empty):
    path = tmp_path / "out"
    if empty:
        path.touch()
    assert run(path) == 3
    assert path.read_bytes() == WHOLE
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_run_goes_on(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(Killed):
        run(path, stop_after=2)
    assert not path.exists()
    assert run(path) == 1
    assert path.read_bytes() == WHOLE


def test_a_kill_at_any_byte_loses_no_whole_answer(tmp_path):
    """Cuts the file of an unfinished run everywhere, as a kill while it is written does."""
    with pytest.raises(Killed):
        run(tmp_path / "first", stop_after=2)
    partial = (tmp_path / "first.partial").read_bytes()
    for size in range(len(partial) + 1):
        path = tmp_path / f"out{size}"
        (tmp_path / f"out{size}.partial").write_bytes(partial[:size])
        whole = max(partial[:size].count(b"\n") - 1, 0)
        assert run(path) == 3 - whole
        assert path.read_bytes() == WHOLE


@pytest.mark.parametrize("call", ["fsync", "rename", "unlink"])
def test_a_kill_while_the_output_is_finished(tmp_path, monkeypatch, call):
    """Catches a finished job that is refused, or begun again, when it is run again."""
    path = tmp_path / "out"

    def killed(*_, **__):
        raise Killed

    where = module.outputs.os if call == "fsync" else module.Path
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(where, call, killed)
        run(path)
    assert run(path) == 0
    assert path.read_bytes() == WHOLE
    assert list(tmp_path.iterdir()) == [path]


def test_another_job_does_not_go_on_there(tmp_path):
    with contextlib.suppress(Killed):
        run(tmp_path / "out", stop_after=1)
    before = (tmp_path / "out.partial").read_bytes()
    for job in (job_digest([0.6], LINES), job_digest([0.5], LINES[1:])):
        with pytest.raises(UserError, match="was left by another job"):
            run(tmp_path / "out", job=job)
    assert (tmp_path / "out.partial").read_bytes() == before


def test_what_is_there_is_kept(tmp_path):
    path = tmp_path / "out"
    path.write_text("precious")
    with pytest.raises(UserError, match="exists and is not empty"):
        run(path)
    assert path.read_text() == "precious" and list(tmp_path.iterdir()) == [path]


def test_a_second_run_beside_the_first_is_refused_at_once(tmp_path):
    with Answers(tmp_path / "out", JOB, LINES):
        with pytest.raises(UserError, match="is being written by another run"):
            run(tmp_path / "out")
        assert (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("line", [b"[1]\n", b"{}\n", b"\0\0\n", b"\xff\n"])
def test_a_damaged_line_is_named(tmp_path, line):
    header = encode({"job": JOB})
    (tmp_path / "out.partial").write_bytes(header + line)
    with pytest.raises(UserError, match=r"out\.partial line 2"):
        run(tmp_path / "out")


def test_an_interrupted_run_that_answered_nothing_can_run_again(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path / "out", stop_after=0)
    assert run(tmp_path / "out") == 3


def test_standard_output_gets_refusals_first_and_answers_as_they_come(capfd):
    assert run("-") == 3
    printed = capfd.readouterr().out.encode().splitlines(keepends=True)
    assert printed[0] == encode(LINES[1].record) and sorted(printed) == sorted(
        WHOLE.splitlines(keepends=True)
    )
