import copy
import json
import math
from pathlib import Path

import pytest
import yaml

from jaxmoe.config import SCOUT
from jaxmoe.errors import UserError
from jaxmoe.hf_config import from_hf, to_hf
from jaxmoe.train.config import read_train_config

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def read(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return read_train_config(path)


def changed(**changes):
    """The demo's YAML with keys `a` or `a__b` set, or removed where the value is None."""
    content = copy.deepcopy(yaml.safe_load(DEMO.read_text()))
    for key, value in changes.items():
        *outer, last = key.split("__")
        place = content[outer[0]] if outer else content
        if value is None:
            del place[last]
        else:
            place[last] = value
    return content


def test_the_demo_config_is_read():
    config = read_train_config(DEMO)
    model = from_hf(config.model, "demo")
    assert [kind.attention for kind in model.layers] == 2 * (3 * ["local"] + ["global"])
    assert config.data.length > 3 * model.attention_chunk_size  # generation crosses chunks


def test_numbers_are_those_of_yaml_1_2(tmp_path):
    text = DEMO.read_text().replace("peak_lr: 0.003", "peak_lr: 3e-3").replace(": 1800", ": 1.8e3")
    config = read(tmp_path, text)
    assert config.optimizer.peak_lr == 0.003
    assert config.steps == 1800 and type(config.steps) is int


@pytest.mark.parametrize("indent", [None, 2])
def test_a_published_config_json_is_a_model(tmp_path, indent):
    published = to_hf(SCOUT, "bfloat16")
    content = changed(model=None)
    text = json.dumps(published, indent=indent)
    assert "1e-05" in text
    config = read(tmp_path, yaml.safe_dump(content) + f"model: {text}\n")
    assert from_hf(config.model, "pasted") == SCOUT


def test_init_takes_the_place_of_a_model(tmp_path):
    config = read(tmp_path, changed(model=None, tokenizer=None, init="checkpoint"))
    assert config.model == {} and config.tokenizer_folder == "checkpoint"


def test_whole_numbers_do_for_floats_and_defaults_hold(tmp_path):
    config = read(tmp_path, changed(optimizer__peak_lr=1, seed=None))
    assert config.optimizer.peak_lr == 1.0 and config.seed == 0 and config.mesh is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(stpes=3), "unknown key 'stpes'; the nearest one is 'steps'"),
        (dict(optimizer__peak_rl=3), "optimizer has the unknown key 'peak_rl'.*'peak_lr'"),
        (dict(data__length=None), "data lacks 'length'"),
        (dict(steps="many"), "'steps' the value 'many'; expected a whole number"),
        (dict(steps=True), "'steps' the value True"),
        (dict(steps=-1), "'steps' the value -1"),
        (dict(optimizer__peak_lr="much"), "'peak_lr' the value 'much'; expected a number from"),
        (dict(optimizer__peak_lr=math.nan), "'peak_lr' the value nan; expected a number from"),
        (dict(optimizer__peak_lr=1e30), r"'peak_lr' the value 1e\+30; expected a number from"),
        (dict(optimizer__clip_norm=math.inf), "'clip_norm' the value inf"),
        (dict(optimizer__beta2=1), "'beta2' the value 1"),
        (dict(router_loss=-0.1), "'router_loss' the value -0.1"),
        (dict(steps=0), "'steps' the value 0; expected a whole number from 1 to"),
        (dict(steps=10**30), "'steps' the value 1000"),
        (dict(data__length=1), "'length' the value 1; expected a whole number from 2"),
        (dict(data__held_out_every=1), "held_out_every 1 leaves nothing to train on"),
        (dict(seed=2**32), "'seed' the value"),
        (dict(output="a\0b"), "'output' the value"),
        (dict(model={}), "run.yaml: give either 'model'.*or 'init'"),
        (dict(init="checkpoint"), "run.yaml: give either 'model'.*or 'init'"),
        (dict(dtype="float16"), "'dtype' the value 'float16'; expected float32 or bfloat16"),
        (dict(data=3), "data holds no mapping"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, changed(**changes))
    assert "run.yaml" in str(error.value)


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "\x00"])
def test_files_that_are_no_mapping_are_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"run\.yaml"):
        read(tmp_path, content)
    with pytest.raises(UserError, match=r"absent\.yaml' cannot be read"):
        read_train_config(tmp_path / "absent.yaml")
