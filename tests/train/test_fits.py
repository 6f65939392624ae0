"""What a run takes of absent H100s: the compiler's figures against sizes that are known."""

import dataclasses
import re

import pytest

from jaxmoe.cli import train as command
from jaxmoe.errors import UserError
from jaxmoe.plan.targets import parse_target
from jaxmoe.train.config import (
    AdapterConfig,
    DataConfig,
    OptimizerConfig,
    PreferenceConfig,
    TrainConfig,
)
from jaxmoe.train.fits import compile_run
from tests import tiny

pytestmark = pytest.mark.absent_gpu

HF = tiny.scout_like(num_hidden_layers=2, no_rope_layer_interval=2, vocab_size=256)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    tiny.write_checkpoint(folder, HF, tiny.random_tensors(HF, 0))
    return str(folder)


def make_config(**changes):
    whole = TrainConfig(
        init="nowhere",
        data=DataConfig(files=("nowhere.jsonl",), length=64, batch_size=4),
        optimizer=OptimizerConfig(peak_lr=1e-3),
        output="nowhere",
        steps=2,
        mesh="fsdp=2",
        dtype="bfloat16",
        remat="full",
    )
    return dataclasses.replace(whole, **changes)


def test_a_whole_model_has_float32_parameters_and_two_moments(model):
    found = compile_run(make_config(), parse_target("h100x2"), model)
    assert found.frozen == 0
    assert found.optimizer == pytest.approx(2 * found.trained, rel=1e-3)
    assert found.temporaries > found.trained  # gradients among them
    assert found.fits


def test_adapters_of_pairs_keep_the_model_as_it_is_stored(model):
    wide = make_config(
        adapter=AdapterConfig(rank=4),
        preference=PreferenceConfig(),
        accumulate=2,
        mesh="sequence=2",
    )
    found = compile_run(wide, parse_target("h100x2"), model, "int8")
    whole = compile_run(make_config(mesh="sequence=2"), parse_target("h100x2"), model)
    assert found.trained < whole.trained / 10
    assert whole.trained / 4 < found.frozen < whole.trained / 2  # int8 and bfloat16, not float32


def test_the_command_prints_it_and_refuses_a_mesh_of_another_size(model, tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(
        "init: nowhere\noutput: nowhere\nsteps: 1\nmesh: fsdp=4\noptimizer: {peak_lr: 0.1}\n"
        "data: {files: [nowhere.jsonl], length: 64, batch_size: 4}\n"
    )
    arguments = ["train", str(tmp_path / "run.yaml"), "--plan", "h100x2", "--model", model]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(UserError, match=re.escape("does not form the 2 device(s) of h100x2")):
        command.main()
