"""Files for clusters: they parse, and their commands find their place by the schedulers' variables.

No cluster runs here: `srun` and `scontrol` are stand-ins, and so is a `jaxmoe` that prints its
environment.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxmoe.cli.launch import Launch, find_launch

CLUSTERS = Path(__file__).parents[2] / "examples/clusters"
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
SAYS = f"""#!{sys.executable}
import json, os, sys
print(sys.argv[1], json.dumps(dict(os.environ)))
sys.exit(0 if sys.argv[1] == "doctor" else int(os.environ.get("CODE", 0)))
"""


@pytest.fixture
def run(tmp_path):
    """Runs a bash script beside stand-ins; returns the exit code and what it printed."""
    for name, text in (
        ("jaxmoe", SAYS),
        ("srun", '#!/bin/bash\nexec "$@"\n'),
        ("scontrol", '#!/bin/bash\necho scontrol "$@"\n'),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run_script(script, **environment):
        variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | environment
        done = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True)
        assert done.stderr == ""
        return done.returncode, list(map(_said, done.stdout.splitlines()))

    return run_script


def _said(line):
    """A command and its place among processes; of a stand-in for another program, the line."""
    command, _, environment = line.partition(" {")
    return (command, find_launch(json.loads("{" + environment))) if environment else line


@pytest.mark.parametrize("code", [0, 1, 70, 75])
def test_slurm_runs_again_what_was_told_to_end(run, code):
    script = (CLUSTERS / "slurm.sh").read_text()
    returned, said = run(script, CODE=str(code), **SLURM)
    place = Launch("SLURM", 2, 1, None, 1, 0)
    requeued = ["scontrol requeue 7"] if code in (70, 75) else []
    assert (returned, said) == (code, [("doctor", place), ("generate", place), *requeued])


@pytest.mark.parametrize("code", [0, 1, 65, 75, 137])
def test_engines_are_run_again_unless_all_is_answered(run, code):
    script = (CLUSTERS / "slurm-engines.sh").read_text()
    returned, said = run(
        script.replace("srun --no-kill --kill-on-bad-exit=0", "srun"), **SLURM, CODE=str(code)
    )
    requeued = ["scontrol requeue 7"] if code in (75, 137) else []
    assert (returned, said[1:], said[0][0]) == (code, requeued, "batch")


def test_skypilot(run):
    job = yaml.safe_load((CLUSTERS / "sky.yaml").read_text())
    nodes = {"NODE_IPS": "10.0.0.1\n10.0.0.2", "NUM_NODES": "2", "NODE_RANK": "1"}
    _, said = run(job["run"], **{f"SKYPILOT_{name}": value for name, value in nodes.items()})
    assert said == [("generate", Launch("JAXMOE_COORDINATOR", 2, 1, "10.0.0.1:9000"))]
    assert job["resources"]["job_recovery"]["recover_on_exit_codes"] == [70, 75]


def test_jobset():
    job = yaml.safe_load((CLUSTERS / "jobset.yaml").read_text())
    (hosts,) = job["spec"]["replicatedJobs"]
    pods = hosts["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    given = {each["name"]: each.get("value", "1") for each in container["env"]}
    name, port = given["JAXMOE_COORDINATOR"].split(":")
    first_pod = f"{job['metadata']['name']}-{hosts['name']}-0-0.{job['metadata']['name']}"
    assert name == first_pod
    assert find_launch(given) == Launch("JAXMOE_COORDINATOR", 2, 1, f"{first_pod}:{port}")
    assert int(given["JAXMOE_NUM_PROCESSES"]) == pods["parallelism"] == pods["completions"]
    assert {os.EX_TEMPFAIL, os.EX_UNAVAILABLE} <= {
        *pods["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]
    }
