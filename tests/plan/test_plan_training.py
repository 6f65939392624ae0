"""The formula of training agrees with compilers for absent hardware, and with the trainer."""

import dataclasses
import json
import re

import jax.numpy as jnp
import pytest

from benchmarks import train_memory
from jaxmoe.cli import plan as command
from jaxmoe.config import SCOUT
from jaxmoe.errors import UserError
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.params import abstract_params
from jaxmoe.plan.backward import training_temporaries
from jaxmoe.plan.compiled import compile_step
from jaxmoe.plan.layout import device_bytes
from jaxmoe.plan.memory import STEP, largest_context, memory
from jaxmoe.plan.targets import parse_target
from jaxmoe.plan.training import nbytes, state_of
from jaxmoe.plan.work import Work, default_run
from jaxmoe.train.trainer import set_up


def two_layers(task, **fields):
    config = dataclasses.replace(SCOUT, layers=SCOUT.layers[2:4])
    return Work(config=config, task=task, **{"context": 8192, "rows": 8, **fields})


@pytest.mark.absent_gpu
@pytest.mark.parametrize(
    ("task", "mesh", "fields"),
    [
        ("lora", "expert=8", {"context": 32768}),
        ("train", "fsdp=8", {}),
    ],
)
def test_within_five_percent_of_the_compiler(task, mesh, fields):
    """Catches what the compiler holds and the formula does not know, and the reverse."""
    work, mesh, target = two_layers(task, **fields), MeshConfig.parse(mesh), parse_target("h100x8")
    formula, compiled = memory(work, mesh), compile_step(work, mesh, target)
    assert formula.weights == compiled.weights
    assert formula.optimizer == pytest.approx(compiled.optimizer, abs=64)
    assert formula.peak == pytest.approx(compiled.peak, rel=0.05)


@pytest.mark.parametrize("figures", json.loads(train_memory.FIGURES.read_text()))
def test_committed_figures_are_those_of_the_formula(figures):
    """Catches a formula that was changed without its table, and one that is off the compiler's."""
    formula, compiled = train_memory.formula(figures["case"]), figures["compiled"]
    assert formula == figures["formula"]
    assert sum(formula.values()) == pytest.approx(compiled["peak"], rel=0.05)


@pytest.mark.parametrize("weights", ["bf16", "int4"])
@pytest.mark.parametrize("mesh", ["fsdp=2,expert=2,tensor=2", "sequence=4,tensor=2"])
def test_adapters_and_what_they_stand_beside_are_those_of_the_trainer(mesh, weights):
    work, mesh = two_layers("lora", weights=weights), MeshConfig.parse(mesh)
    devices = mesh.make()
    stored = abstract_params(work.config, devices, jnp.bfloat16, work.format, pads=False)
    setup = set_up(work.training, work.config, devices, "test", None, lambda n: None, stored)
    state = state_of(work)
    assert nbytes(state.frozen, mesh) == device_bytes(setup.frozen)
    assert nbytes(state.trained, mesh) == device_bytes(setup.abstract.params) > 0
    assert nbytes(state.optimizer, mesh) == device_bytes(setup.abstract.optimizer)


def changed(task, optimizer=None, **fields):
    run = dataclasses.replace(default_run(task), **fields)
    return dataclasses.replace(
        run, optimizer=dataclasses.replace(run.optimizer, **(optimizer or {}))
    )


def test_each_choice_of_a_run_changes_what_it_says():
    mesh = MeshConfig(fsdp=8)
    plain = memory(two_layers("train"), mesh)
    halved = memory(two_layers("train", run=changed("train", params_dtype="bfloat16")), mesh)
    assert 2 * halved.weights == plain.weights
    moments = memory(two_layers("train", run=changed("train", {"moments": "bfloat16"})), mesh)
    assert moments.optimizer == pytest.approx(plain.optimizer * 3 / 4, abs=64)
    factored = memory(two_layers("train", run=changed("train", {"name": "adafactor"})), mesh)
    assert factored.optimizer < plain.optimizer / 100
    summed = memory(two_layers("train", run=changed("train", accumulate=2)), mesh)
    assert summed.gradients == 4 * plain.gradients  # float32 sums, and copies stay in bfloat16
    host = memory(two_layers("train", run=changed("train", {"offload": True})), mesh)
    assert host.optimizer < 64


def test_remat_decides_what_is_kept_and_tensor_shares_it():
    def kept(mesh, remat):
        work = two_layers("lora", rows=1, run=changed("lora", remat=remat))
        return training_temporaries(work, MeshConfig.parse(mesh)).activations

    assert kept("data=1", "full") == 2 * 8192 * 5120 * 2
    assert kept("tensor=8", "full") == kept("data=1", "full") / 8
    assert kept("sequence=2,tensor=4", "full") == kept("data=1", "full") / 8
    assert kept("data=1", "full") < kept("data=1", "attention") < kept("data=1", "dots")


@pytest.mark.parametrize("mesh", ["fsdp=8", "tensor=8"])
def test_the_largest_context_is_the_largest(mesh):
    work, target = two_layers("lora"), parse_target("l40sx8")
    context = largest_context(work, MeshConfig.parse(mesh), target)
    peaks = [
        memory(dataclasses.replace(work, context=x), MeshConfig.parse(mesh), target).peak
        for x in (context, context + STEP)
    ]
    assert peaks[0] <= target.limit < peaks[1]


RUN = """\
init: nowhere
output: nowhere
steps: 1
dtype: bfloat16
remat: full
mesh: fsdp=8
data: {files: [nowhere.jsonl], length: 4096, batch_size: 16}
optimizer: {peak_lr: 1e-4}
adapter: {rank: 4}
"""


def planned(monkeypatch, capsys, tmp_path, run, *more):
    (tmp_path / "run.yaml").write_text(run)
    flags = ["--target", "h100x8", "--run", str(tmp_path / "run.yaml"), "--json", *more]
    monkeypatch.setattr("sys.argv", ["plan", "scout", *flags])
    command.main()
    return json.loads(capsys.readouterr().out)


def test_the_command_plans_a_run(monkeypatch, capsys, tmp_path):
    found = planned(monkeypatch, capsys, tmp_path, RUN)
    assert (found["task"], found["mesh"]) == ("lora", "fsdp=8")
    assert (found["context"], found["batch"]) == (4096, 16)
    assert found["fits"]


@pytest.mark.parametrize(
    ("run", "flags", "words"),
    [
        (RUN, ["--task", "train"], "one of --task lora"),
        (RUN.replace("dtype: bfloat16", "dtype: float32"), [], "dtype bfloat16"),
        (RUN.replace("remat: full", "remat: none"), [], "a 'remat'"),
        (RUN.replace("adapter: {rank: 4}\n", ""), ["--weights", "int4"], "not trained"),
    ],
)
def test_a_run_that_cannot_be_planned(monkeypatch, capsys, tmp_path, run, flags, words):
    with pytest.raises(UserError, match=re.escape(words)):
        planned(monkeypatch, capsys, tmp_path, run, *flags)
