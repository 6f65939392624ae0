"""The recipes are runs of Scout and Maverick, and their small twins train the demo models."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import pytest
import yaml
from safetensors.numpy import load_file

from jaxmoe.checkpoint.convert import convert
from jaxmoe.cli import devices
from jaxmoe.cli import train as command
from jaxmoe.config import PRESETS
from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.planner import resolved
from jaxmoe.plan.targets import parse_target
from jaxmoe.train.config import read_train_config
from jaxmoe.train.trainer import check_names
from tests import tiny
from tests.tiers import slow_after_first

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
MODELS = {  # the twins', and what their matrices are stored in
    "build/demo": ("demo/model", None),
    "build/demo-int4": ("demo/model", "int4"),
    "build/needle": ("demo/needle/model", None),
}
# What a twin may have otherwise than its recipe.
SIZES = {"init", "output", "data", "mesh", "steps", "log_every", "evaluate_every", "save_every"}
SIZED = {
    "optimizer": {"peak_lr", "warmup_steps"},
    "adapter": {"rank", "alpha"},
    "head": {"draft_vocab_size", "intermediate_size"},
}


def planned(name):
    """The target and the model in the command of a recipe's first lines."""
    words = (RECIPES / f"{name}.yaml").read_text().splitlines()[1].split()
    assert words[:5] == ["#", "jaxmoe", "train", f"configs/recipes/{name}.yaml", "--plan"]
    assert words[6] == "--model"
    return words[5], words[7]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_what_its_model_has(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    target, model = planned(name)
    config = read_train_config(RECIPES / f"{name}.yaml")
    check_names(config, PRESETS[model], name)
    mesh = resolved(MeshConfig.parse(config.mesh or "data=-1"), parse_target(target))
    assert config.rows.batch_size % (mesh.data * mesh.fsdp * mesh.expert) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_is_its_recipe_but_for_sizes(name):
    found = [
        dataclasses.asdict(read_train_config(x / f"{name}.yaml"))
        for x in (RECIPES, RECIPES / "small")
    ]
    for config in found:
        for key in SIZES:
            config.pop(key)
        for part, keys in SIZED.items():
            for key in keys if config[part] else ():
                config[part].pop(key)
    assert found[0] == found[1]


LAYERS = 2


def shallow(source, folder):
    """The first layers of a model in Hugging Face's layout, which compile sooner than all of it."""
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "moe_layers": None}
    config |= {key: config[key][:LAYERS] for key in ("no_rope_layers", "layer_types")}
    stored = load_file(source / "model.safetensors")
    tensors = {
        name: tensor
        for name, tensor in stored.items()
        if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < LAYERS
    }
    tiny.write_checkpoint(folder, config, tensors)
    for file in source.glob("token*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Where the demo models are, converted."""
    folder = tmp_path_factory.mktemp("models")
    for place, (source, weights) in MODELS.items():
        convert(shallow(ROOT / source, folder / "hf" / place), folder / place, weights=weights)
    return folder


@pytest.fixture
def checkout(models, tmp_path, monkeypatch):
    """A working directory with the repository's configs and the converted models."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "build").symlink_to(models / "build")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "devices", lambda: jax.devices()[:1])
    return tmp_path


@pytest.mark.parametrize("name", slow_after_first(NAMES))
def test_a_twin_learns(name, checkout, monkeypatch):
    """By the command, in three steps."""
    content = yaml.safe_load((RECIPES / "small" / f"{name}.yaml").read_text())
    content |= {"output": "run", "steps": 3, "log_every": 1, "evaluate_every": 0}
    content["optimizer"]["warmup_steps"] = 0
    (checkout / "run.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr("sys.argv", ["train", "run.yaml"])
    command.main()
    run = checkout / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert len(records) == 3 and records[-1]["loss"] < records[0]["loss"] - 0.01
    assert records[-1]["held_out_loss"] > 0
    result = next((x for x in ("adapter", "head") if x in content), "checkpoint")
    wanted = {result, "config.json", "data", "losses.png", "metrics.jsonl"}
    assert {path.name for path in run.iterdir()} == wanted
