"""Where a process learns that it is one of several, and which GPUs are its own."""

import jax
import pytest

from jaxmoe import processes
from jaxmoe.cli.doctor import mistakes
from jaxmoe.cli.launch import Launch, find_launch, gpus_here, local_gpus
from jaxmoe.errors import UserError

GIVEN = {
    "JAXMOE_COORDINATOR": "a:1",
    "JAXMOE_NUM_PROCESSES": "2",
    "JAXMOE_PROCESS_ID": "1",
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.mark.parametrize(
    "environment, found",
    [
        ({}, None),
        (GIVEN, Launch("JAXMOE_COORDINATOR", 2, 1, "a:1")),
        (GIVEN | SLURM, Launch("JAXMOE_COORDINATOR", 2, 1, "a:1")),
        (SLURM, Launch("SLURM", 5, 4, None, 1, 0)),
        (SLURM | {"SLURM_NODEID": "1"}, Launch("SLURM", 5, 4, None, 2, 0)),
        (SLURM | {"JAXMOE_COORDINATOR": "a:1"}, Launch("SLURM", 5, 4, "a:1", 1, 0)),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (SLURM | {"SLURM_NTASKS": "1", "JAXMOE_COORDINATOR": "a:1"}, None),
        ({"SLURM_JOB_ID": "7", "JAXMOE_COORDINATOR": "a:1"}, None),  # a batch script's own process
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),  # not in srun
        (SLURM | {"JAXMOE_CLUSTER": "off"}, None),
        (OPEN_MPI, Launch("Open MPI", 4, 3, None, 2, 1)),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, Launch("Cloud TPU")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"JAXMOE_CLUSTER": "auto"}, Launch("JAX")),
    ],
)
def test_a_process_knows_its_place(environment, found):
    assert find_launch(environment) == found


@pytest.mark.parametrize("name", GIVEN)
def test_variables_that_are_set_in_part_are_refused(name):
    with pytest.raises(UserError, match="are to be set together"):
        find_launch({key: value for key, value in GIVEN.items() if key != name})


@pytest.mark.parametrize(
    "on_host, local, gpus, own",
    [
        (1, 0, 8, []),  # all: JAX by itself takes the first
        (8, 3, 8, [3]),
        (2, 1, 8, [4, 5, 6, 7]),
        (8, 3, 1, []),  # its scheduler shows each process its own
        (None, None, 8, []),
        (2, 1, 0, []),
    ],
)
def test_a_process_gets_its_share_of_the_gpus(on_host, local, gpus, own):
    assert local_gpus(Launch("SLURM", 16, 3, None, on_host, local), gpus) == own


@pytest.mark.parametrize("on_host", [3, 16])
def test_gpus_that_cannot_be_shared_are_one_sentence(on_host):
    with pytest.raises(UserError, match=f"{on_host} processes on a host of 8 GPUs"):
        local_gpus(Launch("SLURM", 16, 3, None, on_host, 1), 8)


@pytest.mark.parametrize("visible, count", [("", 0), ("0", 1), ("0,1,5", 3)])
def test_gpus_are_counted_without_jax(visible, count):
    assert gpus_here({"CUDA_VISIBLE_DEVICES": visible}) == count


def test_a_doctor_names_what_is_wrong():
    host = {"host": "a", "devices": 1, "gpus": 8, "proxies": []}
    (sentence,) = mistakes([host])
    assert sentence.startswith("a has 8 GPUs, and its 1 processes take 1; start one process a host")
    assert len(mistakes([host | {"devices": 8}] * 2)) == 1  # which both take all
    assert mistakes([host | {"devices": 8}]) == []
    two = [host | {"devices": 8}, host | {"host": "b", "devices": 8, "proxies": ["http_proxy"]}]
    assert mistakes(two) == ["http_proxy may keep the processes apart; unset them."]
    two = [host | {"devices": 8}, host | {"host": "b", "devices": 4, "gpus": 4}]
    assert len(mistakes(two)) == 1


@pytest.mark.parametrize("started", [False, True])
def test_the_hosts_of_a_slice_are_several_once_jax_has_started(monkeypatch, started):
    """Catches hosts of a TPU slice that all write, and a question that starts devices."""
    monkeypatch.setattr(processes.xla_bridge, "backends_are_initialized", lambda: started)
    monkeypatch.setattr(jax, "process_count", lambda: 4 if started else pytest.fail("it starts"))
    assert processes.several() == started
