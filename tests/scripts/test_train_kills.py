"""SIGKILL at any moment of a run: it resumes, and its weights and records are as if undisturbed.

`JAXMOE_KILLS=100` kills more often, `JAXMOE_KILL_SEED` repeats a run.
"""

import os
import random
import signal
import time

import pytest

from tests.scripts import training

KILLS = int(os.environ.get("JAXMOE_KILLS", "2"))
SEED = int(os.environ.get("JAXMOE_KILL_SEED", time.time_ns() % 10**6))
RUN = {"steps": 120, "save_every": 3, "evaluate_every": 40, "keep": "best", "not_finite": "skip"}


def killed_at_random(config, moments):
    """Starts a run and kills it, in half of the cases only once it takes steps."""
    metrics = config.with_suffix("") / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    process = training.start(config)
    if moments.random() < 0.5:
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > size):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1))
    else:
        time.sleep(moments.uniform(0, 8))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_at_random_times(tmp_path):
    moments = random.Random(SEED)
    undisturbed = training.write_config(tmp_path, "undisturbed", **RUN)
    process = training.start(undisturbed)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    killed, runs = 0, 0
    while killed < KILLS:
        runs += 1
        config = training.write_config(tmp_path, f"run{runs}", **RUN)
        checkpoint = config.with_suffix("") / "checkpoint"
        while killed < KILLS and not checkpoint.exists():
            killed += killed_at_random(config, moments)
        process = training.start(config)
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
        what = f"after {killed} kills of JAXMOE_KILL_SEED={SEED}"
        assert training.checkpoint_digest(config) == training.checkpoint_digest(undisturbed), what
        assert training.without_speed(training.records(config)) == training.without_speed(
            training.records(undisturbed)
        ), what
    print(f"{killed} kills in {runs} runs, JAXMOE_KILL_SEED={SEED}")
