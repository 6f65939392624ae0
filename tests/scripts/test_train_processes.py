"""A run of two processes: killed and resumed on four, it has the losses of one."""

import numpy as np
import pytest

from tests.scripts import training

RUN = {"steps": 20, "evaluate_every": 2, "keep": "best", "accumulate": 2, "selection_bias": 0.001}


@pytest.fixture
def alone(tmp_path):
    """What one process with all four devices logs."""
    config = training.write_config(tmp_path, "alone", **RUN)
    process = training.start(config)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return training.records(config)


def run_together(config, count):
    """How many of so many processes say that they have written the checkpoint; all end well."""
    processes = training.start_together(config, count)
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * count, said
    return [out.count("Wrote ") for out, _ in said]


@pytest.mark.slow
def test_two_and_four_processes_train_as_one(tmp_path, alone):
    config = training.write_config(tmp_path, "together", cpu_devices=2, **RUN)
    killed = training.start_together(config, 2)
    training.wait_for_steps(config, killed[0])
    for process in killed:
        process.kill()
        process.communicate()
    config = training.write_config(tmp_path, "together", cpu_devices=1, **RUN)
    assert run_together(config, 4) == [1, 0, 0, 0]
    together = training.records(config)
    assert [record["step"] for record in together] == list(range(1, 21))
    for name in ("loss", "held_out_loss", "gradient_norm"):
        found = [[r[name] for r in records if name in r] for records in (together, alone)]
        np.testing.assert_allclose(*found, rtol=1e-5)
    names = {path.name for path in (tmp_path / "together").iterdir()}
    assert names == {"config.json", "metrics.jsonl", "losses.png", "best", "checkpoint"}
    config = training.write_config(tmp_path, "together", cpu_devices=2, **RUN)
    assert run_together(config, 2) == [0, 0]  # it is finished
