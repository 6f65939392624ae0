import io
import json
import sys

import numpy as np
import pytest
import yaml

from jaxmoe.checkpoint import store
from jaxmoe.cli import train as script
from jaxmoe.progress import task_progress
from tests import scripts, tiny
from tests.conftest import one_device


def train_script(folder, **changes):
    """Runs the script on a tiny model and two simulated devices."""
    np.save(folder / "tokens.npy", np.arange(1000) % 100)
    model = tiny.scout_like(
        num_hidden_layers=1, hidden_size=16, intermediate_size=16, bos_token_id=0
    )
    config = {
        "model": model,
        "data": {"tokens": str(folder / "tokens.npy"), "length": 16, "batch_size": 2},
        "optimizer": {"peak_lr": 0.01},
        "output": str(folder / "run"),
        "steps": 4,
        "log_every": 2,
        "mesh": "expert=2",
        "cpu_devices": 2,
        "checkpoint_dtype": "bfloat16",
        **changes,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return scripts.run("train.py", folder / "run.yaml")


def test_a_run_ends_in_a_checkpoint_that_loads(tmp_path):
    result = train_script(tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert [line.split()[:2] for line in lines] == [["step", "2/4"], ["step", "4/4"]]
    config, params = store.load(tmp_path / "run" / "checkpoint", one_device())
    assert config.num_hidden_layers == 1 and params["embed"].dtype == "bfloat16"
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["step"] == 4
    again = train_script(tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout == f"{tmp_path}/run/checkpoint is finished: nothing is left to do.\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_on_a_terminal_shows_the_loss(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with task_progress("Training", 3_686_400, "tokens") as advance:
        advance(20_480, script.losses({"step": 10, "loss": 2.99812, "gradient_norm": 1.0}))
    assert "loss 2.998" in sys.stderr.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(stpes=4), "the nearest one is 'steps'"),
        (dict(mesh="tensor=2", model=tiny.scout_like(intermediate_size=15)), "does not divide"),
    ],
)
def test_a_mistake_is_one_line_and_exit_1(tmp_path, changes, message):
    result = train_script(tmp_path, **changes)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "run").exists()
