"""Commands as two and four processes, as on hosts: the first one writes, all see, all end."""

import functools
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest

from tests.scripts import succeeds, together
from tests.scripts.heads import ALWAYS_DRAFTS, convert_random_head, drafts_tried
from tests.scripts.test_read import MODEL

FLAGS = ("--dtype", "float32", "--mesh", "data=2,expert=2", "--cpu-devices")
ONE, TWO, FOUR = ((*FLAGS, 4 // count) for count in (1, 2, 4))  # of each of so many processes
succeed = functools.partial(together.succeed, 2)
succeed_as_four = functools.partial(together.succeed, 4)


def wait_for_an_answer(path, processes):
    partial = path.with_name(path.name + ".partial")

    def lines():
        return (
            partial.read_bytes().count(b"\n") if partial.exists() else 1
        )  # the first names the job

    before = lines()
    while lines() <= before:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


@pytest.mark.slow
def test_a_job_is_killed_stopped_and_ended_elsewhere(small, tmp_path):
    source, output, other = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "other.jsonl"))
    requests = [{"id": n, "tokens": [n + 1, 7]} for n in range(24)]
    source.write_text("".join(json.dumps(request) + "\n" for request in requests))
    job = ("generate.py", small.checkpoint, "--prompts", source, "--max-new-tokens", 40)
    job += ("--rows", 2, "--output")

    processes = together.start_together(2, *job, output, *TWO)
    wait_for_an_answer(output, processes)
    processes[1].kill()
    killed = time.monotonic()
    codes, _, said = together.ends(processes)
    assert time.monotonic() - killed < 10  # not the minutes that JAX takes by itself
    assert codes[0] in (os.EX_UNAVAILABLE, -signal.SIGABRT), said
    assert "Traceback" not in said[0]
    assert codes[1] == -signal.SIGKILL

    processes = together.start_together(2, *job, output, *TWO)
    wait_for_an_answer(output, processes)
    processes[1].send_signal(signal.SIGTERM)  # one of them is told
    codes, _, said = together.ends(processes)
    assert codes == [75, 75], said
    assert "requests were answered; their answers are kept; run again." in said[0]
    assert "stopped" not in said[1]  # the first process speaks

    elsewhere = ("--dtype", "float32", "--mesh", "tensor=2", "--cpu-devices", 2)
    alone = together.start(*job, output, *elsewhere)
    wait_for_an_answer(output, [alone])
    alone.send_signal(signal.SIGUSR1)
    codes, _, said = together.ends([alone])
    assert codes == [75] and "were answered; their answers are kept" in said[0]
    succeed_as_four(*job, output, *FOUR)
    succeeds(*job, other, *ONE)
    assert output.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_a_head_drafts_on_two_processes(small, tmp_path):
    """The guesses are whole on both, and answers are those of one without a head."""
    allowed = convert_random_head(tmp_path, small.checkpoint)[:2]
    given = {"max_tokens": 20, "temperature": 1, "allowed_token_ids": allowed}
    source, output, other = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "other.jsonl"))
    requests = [{"id": n, "tokens": [n + 1, 7, 9], "seed": n} | given for n in range(6)]
    source.write_text("".join(json.dumps(request) + "\n" for request in requests))
    job = (small.checkpoint, "--prompts", source, "--rows", 8, "--output")
    drafting = ALWAYS_DRAFTS, "generate", *job, output
    flags = (*TWO, "--head", tmp_path / "head")
    counted = tmp_path / "counted"
    counted.mkdir()
    crew = together.start_together(2, *drafting, *flags, COUNTED=str(counted))
    codes, _, said = together.ends(crew)
    assert codes == [0, 0], said
    one, other_ = drafts_tried(counted)
    assert one == other_ > 20
    succeeds("generate.py", *job, other, *ONE, "--drafts", 0)
    assert output.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_logits_of_several_processes(small, tmp_path):
    """By a job's file, whose flags the command line adds to."""
    tokens = np.random.default_rng(0).integers(1, 100, (2, 40))
    np.savez(tmp_path / "tokens.npz", tokens=tokens)
    job = {"command": "evaluate logits", "checkpoint": small.checkpoint, "dtype": "float32"}
    job |= {"tokens": str(tmp_path / "tokens.npz"), "mesh": {"data": 2, "expert": 2}}
    (tmp_path / "job.yaml").write_text(json.dumps(job))  # which is YAML
    for count in (1, 2, 4):
        flags = ("--output", tmp_path / f"{count}.npy", "--cpu-devices", 4 // count)
        together.succeed(count, "run.py", tmp_path / "job.yaml", *flags)
    one, two, four = (np.load(tmp_path / f"{count}.npy") for count in (1, 2, 4))
    np.testing.assert_allclose(two, one, atol=1e-5)
    np.testing.assert_allclose(four, one, atol=1e-5)


@pytest.fixture
def needle(tmp_path):
    """Converted by the first of four processes; catches several that write the same folder.

    Its local layers see few tokens at once, so that a short text can be interrupted.
    """
    source = tmp_path / "model"
    shutil.copytree(MODEL, source)
    config = json.loads((source / "config.json").read_text()) | {"attention_chunk_size": 128}
    (source / "config.json").write_text(json.dumps(config))
    succeed_as_four("convert.py", source, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def wait_for_a_save(workspace, processes):
    note = workspace / "progress.json"
    while not note.exists() or '"saved": 0' in note.read_text():
        assert all(process.poll() is None for process in processes), together.ends(processes)
        time.sleep(0.01)


@pytest.mark.slow
def test_a_document_is_read_on_some_and_asked_on_others(needle, tmp_path):
    text, questions = tmp_path / "text.txt", tmp_path / "questions.jsonl"
    text.write_text("The quick brown fox. " * 400)
    line = {"id": 0, "prompt": " What", "max_new_tokens": 8}
    questions.write_text(json.dumps(line) + "\n")
    read = ("read.py", needle, text, "--prefill-chunk", 256, "--save-every", 256, "--output")
    processes = together.start_together(2, *read, tmp_path / "by two", *TWO)
    wait_for_a_save(tmp_path / "by two.partial", processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, _, said = together.ends(processes)
    assert codes == [75, 75], said
    assert "tokens were read, and what is saved is kept; run again." in said[0]
    assert " of them before" in succeeds(*read, tmp_path / "by two", *ONE)[1]
    succeeds(*read, tmp_path / "by one", *ONE)

    ask = ("generate.py", needle, "--prompts", questions, "--document")
    succeeds(*ask, tmp_path / "by two", *ONE, "--output", tmp_path / "one.jsonl")
    succeed(*ask, tmp_path / "by one", *TWO, "--output", tmp_path / "two.jsonl")
    succeed_as_four(*ask, tmp_path / "by two", *FOUR, "--output", tmp_path / "four.jsonl")
    one, two, four = ((tmp_path / f"{x}.jsonl").read_bytes() for x in ("one", "two", "four"))
    assert one == two == four


def test_a_doctor_says_what_each_process_sees(tmp_path):
    doctor = ("doctor.py", "--mesh", "data=2,expert=2", "--cpu-devices", 2, "--shared", tmp_path)
    codes, out, said = together.ends(together.start_together(2, *doctor))
    assert codes == [0, 0], said
    assert "2 processes, 4 devices" in out[0]
    assert "All-reduce over each axis" in out[0]
    assert "All-reduce" not in out[1]
    assert os.listdir(tmp_path) == []


def test_processes_that_differ_are_refused():
    """Catches programs whose processes wait for each other forever."""
    commands = [("doctor.py", "--cpu-devices", 2, "--shared", name) for name in ("a", "b")]
    codes, _, said = together.ends(together.start_each(commands))
    assert codes[1] == 1
    assert "process 0 has others; start all in the same way. [process 1 of 2]" in said[1]
