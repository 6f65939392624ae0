"""Signals at any moment of batch jobs: each row is answered once, as without signals or drafts.

Half of the programs draft with a random head, in every step.

`JAXMOE_KILLS=1000` disturbs more often, `JAXMOE_KILL_SEED` repeats a run.
"""

import contextlib
import json
import os
import random
import signal
import time

import pytest

from tests.scripts import FOLDER, succeeds, together
from tests.scripts.heads import ALWAYS_DRAFTS, convert_random_head, drafts_tried

KILLS = int(os.environ.get("JAXMOE_KILLS", "12"))
SEED = int(os.environ.get("JAXMOE_KILL_SEED", time.time_ns() % 10**6))
ROWS, BLOCK = 96, 8
CREWS = {  # programs at once, and processes of each
    "one": (1, 1),
    "two": (2, 1),
    "four": (4, 1),
    "one of two processes": (1, 2),
    "one of four processes": (1, 4),
}
SHARE = {"one": 3, "two": 4, "four": 3}  # of 12 signals; else 1
MESHES = {2: ("data=2", "tensor=2"), 4: ("data=2,tensor=2",)}  # by devices; of programs, by chance
AGAIN, LOST = (75, -signal.SIGTERM), (69, -signal.SIGABRT)  # told to stop; without its peer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the rows, a head and counts of drafts are."""
    found = tmp_path_factory.mktemp("job")
    (found / "counted").mkdir()
    return found


@pytest.fixture(scope="module")
def flags(small, folder):
    guessed = convert_random_head(folder, small.checkpoint)
    rows = [
        {"id": f"row {n}", "tokens": [n % 100 + 1, 7], "max_tokens": 5 + n % 40}
        | ({"temperature": 0.0} if n % 2 else {"temperature": 1.0, "seed": n})
        | ({"allowed_token_ids": guessed[:2]} if n % 3 == 0 else {})  # answers with right drafts
        for n in range(ROWS)
    ]
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--input", source, "--block-rows", BLOCK, "--rows", 3, "--dtype", "float32"]
    return [small.checkpoint, *flags, "--output"]


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    succeeds("batch.py", *flags, output, "--mesh", "data=2", "--cpu-devices", 2, "--drafts", 0)
    return answers(output)


@pytest.fixture(scope="module")
def commands(flags, folder):
    """The job as programs run it, each with one of these."""
    return [
        [FOLDER / "batch.py", *flags],
        [ALWAYS_DRAFTS, "batch", "--head", folder / "head", *flags],
    ]


def answers(output):
    return {path.name: path.read_bytes() for path in sorted((output / "answers").iterdir())}


def begin(commands, output, processes, moments):
    command = moments.choice(commands)
    count = max(2, processes)
    devices = ["--mesh", moments.choice(MESHES[count]), "--cpu-devices", count // processes]
    if processes == 1:
        return [together.start(*command, output, *devices)]
    patience = {"JAXMOE_HEARTBEAT": "2", "JAXMOE_START_TIMEOUT": "30"}
    return together.start_together(processes, *command, output, *devices, **patience)


def ended(crew):
    """How a program ended, once one of its processes has; all of them have to."""
    codes, _, said = together.ends(crew)
    assert all(code in (0, *AGAIN, *LOST, -signal.SIGKILL) for code in codes), (codes, said)
    return codes


def lines(output):
    """Rows that are kept, in parts or in journals, some twice for a moment."""
    count = 0
    for folder in ("answers", "journal"):
        with contextlib.suppress(FileNotFoundError):
            for path in (output / folder).iterdir():
                with contextlib.suppress(FileNotFoundError):
                    count += path.read_bytes().count(b"\n")
    return count


def wait_for_work(output, crews, moments):
    """Waits for a random moment, often one at which rows end."""
    if moments.random() < 0.3:
        time.sleep(moments.uniform(0, 4))
        return
    before, waited = lines(output), time.monotonic()
    while lines(output) == before and time.monotonic() - waited < 60:
        if any(process.poll() is not None for crew in crews for process in crew):
            return
        time.sleep(0.005)
    time.sleep(moments.uniform(0, 0.1))


def disturb(commands, output, crew, moments, wanted):
    """Sends signals until there were so many or the job has ended; returns how many there were."""
    programs, processes = CREWS[crew]
    crews = [begin(commands, output, processes, moments) for _ in range(programs)]
    sent = 0
    while crews:
        wait_for_work(output, crews, moments)
        alive = [c for c in crews if all(process.poll() is None for process in c)]
        if alive and sent < wanted:
            chosen = moments.choice(moments.choice(alive))
            chosen.send_signal(moments.choice([signal.SIGKILL] * 3 + [signal.SIGTERM]))
            sent += 1
            with contextlib.suppress(Exception):
                chosen.wait(timeout=10)
        over = [c for c in crews if any(process.poll() is not None for process in c)]
        for c in over:
            crews.remove(c)
            if set(ended(c)) != {0} and sent <= wanted:
                crews.append(begin(commands, output, processes, moments))
    return sent


@pytest.fixture(autouse=True)
def counted(folder, monkeypatch):
    monkeypatch.setenv("COUNTED", str(folder / "counted"))


@pytest.mark.slow
def test_a_head_drafts(commands, undisturbed, folder, tmp_path):
    succeeds(*commands[1], tmp_path / "out", "--mesh", "data=2", "--cpu-devices", 2)
    assert answers(tmp_path / "out") == undisturbed
    assert sum(drafts_tried(folder / "counted")) > ROWS


@pytest.mark.slow
@pytest.mark.parametrize("crew", CREWS)
def test_signals_at_random_times(commands, undisturbed, folder, tmp_path, crew):
    moments = random.Random(f"{SEED} {crew}")
    wanted, sent, jobs = max(1, KILLS * SHARE.get(crew, 1) // 12), 0, 0
    while sent < wanted:
        jobs += 1
        output = tmp_path / f"out{jobs}"
        sent += disturb(commands, output, crew, moments, wanted - sent)
        what = f"after {sent} signals of JAXMOE_KILL_SEED={SEED}"
        assert answers(output) == undisturbed, what
        for name in ("journal", "workers"):
            assert not list((output / name).iterdir()), what
        assert not (output / "errors").exists(), what
        assert json.loads((output / "report.json").read_text())["answered"] == ROWS, what
    drafts = sum(drafts_tried(folder / "counted"))
    print(f"{crew}: {sent} signals in {jobs} jobs, {drafts} drafts, JAXMOE_KILL_SEED={SEED}")
