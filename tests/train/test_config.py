import copy
from pathlib import Path

import pytest
import yaml

from jaxmoe.errors import UserError
from jaxmoe.hf_config import from_hf
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
        (dict(optimizer__peak_lr="3e-3"), "expected a number such as 0.001"),  # YAML reads text
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
    with pytest.raises(UserError, match=r"absent\.yaml cannot be read"):
        read_train_config(tmp_path / "absent.yaml")
