"""Signals that end a run after its step: the state is saved, and the exit code says run again."""

import signal

import pytest

from tests.scripts import together, training


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_the_state_and_says_run_again(tmp_path, name):
    config = training.write_config(tmp_path, "run", steps=10**6, save_every=0)
    process = training.start(config)
    training.wait_for_steps(config, process)
    process.send_signal(getattr(signal, name))
    _, stderr = process.communicate()
    assert process.returncode == 75, stderr
    last = training.records(config)[-1]["step"]
    said = f"stopped: the state after step {last} is kept in {tmp_path}/run/states; run again."
    assert stderr.splitlines()[-1] == said
    assert [path.name for path in (tmp_path / "run" / "states").iterdir()] == [str(last)]


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step(tmp_path):
    """Only one of them gets the signal. Catches a state that a process saves alone."""
    config = training.write_config(tmp_path, "run", steps=10**6, save_every=0, cpu_devices=2)
    processes = training.start_together(config, 2)
    training.wait_for_steps(config, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    codes, _, said = together.ends(processes)
    assert codes == [75, 75], said
    assert "stopped: the state after step" in said[0]
    assert len(list((tmp_path / "run" / "states").iterdir())) == 1
