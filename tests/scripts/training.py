"""Training runs as processes: their config files, commands and results."""

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import yaml

from tests import tiny
from tests.scripts import together
from tests.scripts.forks import Forked

MODEL = tiny.scout_like(num_hidden_layers=1, hidden_size=16, intermediate_size=16, bos_token_id=0)


def write_config(folder: Path, name: str, **changes) -> Path:
    """A run of a tiny model on four simulated devices, with a state after every second step."""
    np.save(folder / "tokens.npy", np.tile([0, *range(5, 21)], 100))
    config = {
        "model": MODEL,
        "data": {
            "tokens": str(folder / "tokens.npy"),
            "length": 16,
            "batch_size": 4,
            "held_out_every": 10,
        },
        "optimizer": {"peak_lr": 0.01, "warmup_steps": 1},
        "output": str(folder / name),
        "steps": 6,
        "log_every": 1,
        "save_every": 2,
        "mesh": "data=2,fsdp=2",
        "cpu_devices": 4,
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(config: Path) -> Forked:
    """Begins a run."""
    return together.start("train.py", config)


def start_together(config: Path, count: int) -> list[Forked]:
    """Begins a run of several processes."""
    return together.start_together(count, "train.py", config)


def wait_for_steps(config: Path, process: Forked) -> None:
    """Returns once a run has logged a step, or has ended."""
    metrics = config.with_suffix("") / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)


def records(config: Path) -> list[dict]:
    """What a run logged."""
    output = yaml.safe_load(config.read_text())["output"]
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_speed(found: list[dict]) -> list[dict]:
    """Records without what differs from run to run."""
    return [{k: v for k, v in r.items() if "second" not in k} for r in found]


def checkpoint_digest(config: Path) -> str:
    """A checksum of the finished checkpoint's files and their names."""
    output = yaml.safe_load(config.read_text())["output"]
    digest, folder = hashlib.sha256(), Path(output) / "checkpoint"
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()
