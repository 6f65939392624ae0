"""SIGKILL while a job is answered: it goes on, loses no answer, ends as without kills or drafts.

`JAXMOE_KILLS=100` kills more often, `JAXMOE_KILL_SEED` repeats a run.
"""

import json
import os
import random
import signal
import time

import pytest

from tests.scripts import succeeds, together

KILLS = int(os.environ.get("JAXMOE_KILLS", "2"))
SEED = int(os.environ.get("JAXMOE_KILL_SEED", time.time_ns() % 10**6))


def answers(path):
    """The whole lines of an unfinished output, after the first, which names the job."""
    if not path.exists():
        return []
    return path.read_bytes().split(b"\n")[1:-1]


@pytest.mark.slow
def test_killed_at_random_times(small, tmp_path):
    moments = random.Random(SEED)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    repeats = {"allowed_token_ids": [7, 8], "temperature": 0}  # answers with right drafts
    requests = [{"id": n, "tokens": [n % 100 + 1, 7]} for n in range(4 * KILLS + 8)]
    requests[::2] = [request | repeats for request in requests[::2]]
    source.write_text("".join(json.dumps(request) + "\n" for request in requests))
    options = [small.checkpoint, "--prompts", str(source), "--max-new-tokens", "40", "--rows", "2"]
    undisturbed = tmp_path / "undisturbed.jsonl"
    succeeds("generate.py", *options, "--output", undisturbed, "--drafts", "0")
    partial, killed = tmp_path / "out.jsonl.partial", 0
    while killed < KILLS and not output.exists():
        before = answers(partial)
        process = together.start("generate.py", *options, "--output", output)
        while process.poll() is None and answers(partial) == before:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        kept = answers(partial) if partial.exists() else output.read_bytes().splitlines()
        assert set(before) <= set(kept), f"kill {killed} of JAXMOE_KILL_SEED={SEED}"
    print(f"{killed} killed, {len(answers(partial))} of {len(requests)} answered meanwhile")
    assert killed
    if not output.exists():
        _, stderr = succeeds("generate.py", *options, "--output", output)
        assert "were answered before" in stderr
    assert output.read_bytes() == undisturbed.read_bytes()
