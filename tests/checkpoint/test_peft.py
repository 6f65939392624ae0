"""Adapters in PEFT's files: written, read again, and refused with a sentence."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmoe.checkpoint.peft import read_adapter, write_adapter
from jaxmoe.errors import UserError
from jaxmoe.hf_config import from_hf
from jaxmoe.model import adapters
from jaxmoe.model.lora import LoraMatrix
from jaxmoe.model.params import named_params, named_specs, unflatten_params
from tests import tiny
from tests.conftest import one_device

D, F, E, R = 48, 40, 3, 2
HF = tiny.maverick_like(
    num_hidden_layers=2, hidden_size=D, intermediate_size=F, num_local_experts=E
)
CONFIG = from_hf(HF, "test")
EXPERTS = "base_model.model.model.layers.1.feed_forward.experts"
ALL = tuple(adapters.adaptable(CONFIG))
ROUTED = tuple(f"layers.1.feed_forward.experts.{x}" for x in ("gate", "up", "down"))


def random_adapters(names=ALL, scale=2.0):
    """Parameters of which only adapters are there, some of a larger rank."""
    ranks = {name: R + (name == "layers.0.attention.q") for name in names}
    abstract = adapters.abstract_adapters(CONFIG, one_device(), ranks)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), abstract)
    new = {name: LoraMatrix(None, *map(as_array, pair), scale) for name, pair in drawn.items()}
    return unflatten_params(CONFIG, [new.get(name) for name in named_specs(CONFIG)])


def as_array(x):
    return None if x is None else jax.numpy.asarray(x)


def plain_params():
    """Parameters without numbers, beside which adapters are read."""
    return unflatten_params(CONFIG, [spec for spec in named_specs(CONFIG).values()])


def read(folder, **options):
    adapter = read_adapter(folder, CONFIG, **options)
    params = adapter.added_to(plain_params(), one_device(), "float32")
    return {n: w for n, (_, w) in named_params(CONFIG, params).items() if isinstance(w, LoraMatrix)}


@pytest.mark.parametrize("layout", ["peft-0.18", "peft-0.19"])
@pytest.mark.parametrize("names", [ALL, ROUTED[:2], ROUTED[2:]], ids=["all", "gate and up", "down"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_written_is_read(tmp_path, layout, names, rslora):
    params = random_adapters(names)
    write_adapter(tmp_path / "out", CONFIG, params, rslora=rslora, layout=layout)
    found = read(tmp_path / "out")
    assert set(found) == set(names)
    for name, (_, w) in named_params(CONFIG, params).items():
        if name in names:
            assert abs(found[name].scale - 2.0) < 1e-8
            same = (found[name].a, found[name].b), (w.a, w.b)
            jax.tree.map(np.testing.assert_array_equal, *same)


def test_experts_lie_by_rows_and_by_columns(tmp_path):
    """A's rows expert by expert, B's columns rank by rank; which side is A's, the version says."""
    params = random_adapters()
    experts = params["layers"][1]["feed_forward"]["experts"]
    up, down = experts["up"], experts["down"]
    for layout in ("peft-0.18", "peft-0.19"):
        write_adapter(tmp_path / layout, CONFIG, params, layout=layout)
    older, newer = (
        load_file(tmp_path / x / "adapter_model.safetensors") for x in ("peft-0.18", "peft-0.19")
    )
    e, i = 1, 1
    A, B = older[f"{EXPERTS}.lora_A.weight"], older[f"{EXPERTS}.lora_B.weight"]
    assert (A.shape, B.shape) == ((E * R, F), (D, R * E))
    np.testing.assert_array_equal(A[e * R + i], down.a[e, :, i])
    np.testing.assert_array_equal(B[:, i * E + e], down.b[e, i])
    inner = f"{EXPERTS}.base_layer.lora_"
    A, B = newer[f"{inner}A.weight"], newer[f"{inner}B.weight"]
    assert (A.shape, B.shape) == ((E * R, 2 * F), (D, R * E))
    np.testing.assert_array_equal(A[e * R + i, F:], up.b[e, i])
    np.testing.assert_array_equal(B[:, i * E + e], experts["gate"].a[e, :, i])


@pytest.fixture
def folder(tmp_path):
    write_adapter(tmp_path / "adapter", CONFIG, random_adapters(), layout="peft-0.18")
    return tmp_path / "adapter"


def change(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder, edit):
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_the_settings_that_peft_needs(folder):
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (R, 2 * R)
    q = "model.layers.0.self_attn.q_proj"
    assert settings["rank_pattern"] == {q: R + 1} and settings["alpha_pattern"] == {q: 2 * R + 2}
    assert settings["target_parameters"] == [
        "model.layers.1.feed_forward.router.weight",
        "model.layers.1.feed_forward.experts.gate_up_proj",
        "model.layers.1.feed_forward.experts.down_proj",
    ]
    assert "model.layers.1.feed_forward.shared_expert.up_proj" in settings["target_modules"]


def test_patterns_of_alphas(folder):
    """The first that matches the end of a name counts."""
    change(folder, alpha_pattern={"q_proj": 3, "layers.1.self_attn.q_proj": 5, r".*\.down_proj": 7})
    found = read(folder)
    assert found["layers.1.attention.q"].scale == 3 / R
    assert found["layers.1.feed_forward.experts.down"].scale == 7 / R
    assert found["layers.1.feed_forward.experts.up"].scale == 2


def square(folder, version):
    """Experts of a model with 2 F = D and rows that could be either."""
    config = from_hf({**HF, "intermediate_size": D // 2}, "test")
    shapes = {"A": (E * R, D), "B": (D, R * E)}
    tensors = {f"{EXPERTS}.lora_{x}.weight": np.ones(s, np.float32) for x, s in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    change(folder, peft_version=version, target_parameters=["experts.gate_up_proj"])
    return read_adapter(folder, config)


def test_the_version_decides_where_widths_do_not(folder):
    assert [square(folder, v).layout for v in ("0.18.1", "0.19.0", "1.0")] == [
        "peft-0.18",
        "peft-0.19",
        "peft-0.19",
    ]
    with pytest.raises(UserError, match="give its peft_version"):
        square(folder, None)


def test_names_with_and_without_the_prefix_of_a_text_model(folder):
    def nested(tensors):
        for name in list(tensors):
            end = name.removeprefix("base_model.model.")
            tensors[f"base_model.model.language_model.{end}"] = tensors.pop(name)
        tower = "base_model.model.vision_model.model.layers.0.mlp.fc1.lora_"
        tensors |= {f"{tower}{x}.weight": np.ones((2, 2), np.float32) for x in "AB"}

    change_tensors(folder, nested)
    with pytest.raises(UserError, match=r"vision_model.*no matrix of this model"):
        read_adapter(folder, CONFIG)
    assert set(read(folder, text_only=True)) == set(ALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(use_dora=True), "'use_dora' the value True"),
        (dict(bias="all"), "'bias' the value 'all'"),
        (dict(modules_to_save=["lm_head"]), "'modules_to_save'"),
        (dict(fan_in_fan_out=True), "'fan_in_fan_out'"),
        (dict(init_lora_weights="pissa_niter_4"), "'init_lora_weights'"),
        (dict(some_new_kind={"a": 1}), "'some_new_kind'"),
        (dict(peft_type="LOHA"), "no LoRA adapter"),
        (dict(lora_alpha="8"), "damaged: an alpha"),
        (dict(alpha_pattern={"(": 1}), "damaged"),
        (dict(target_parameters="experts"), "damaged: target_parameters"),
    ],
)
def test_settings_that_are_refused(folder, changes, message):
    change(folder, **changes)
    with pytest.raises(UserError, match=message) as caught:
        read_adapter(folder, CONFIG)
    assert "adapter_config.json" in str(caught.value)


def drop(name):
    return lambda tensors: tensors.pop(f"base_model.model.{name}")


def put(name, shape):
    def edit(tensors):
        tensors[f"base_model.model.{name}"] = np.ones(shape, np.float32)

    return edit


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(f"{Q}.lora_B.weight"), r"lacks .*q_proj\.lora_B"),
        (put(f"{Q}.lora_magnitude_vector", (4,)), "no LoRA of a matrix"),
        (put("lm_head.lora_embedding_A", (4, 4)), "no LoRA of a matrix"),
        (put(f"{Q}.lora_A.weight", (3, D + 1)), "do not adapt 48 inputs and 128 outputs"),
        (put(f"{Q}.lora_A.weight", (4, D)), "do not adapt"),
        (put(f"{Q}.lora_A.weight", (3 * D,)), "do not adapt"),
        (put(EXPERTS.removeprefix("base_model.model.") + ".lora_A.weight", (7, F)), "do not adapt"),
    ],
)
def test_tensors_that_are_refused(folder, edit, message):
    change_tensors(folder, edit)
    with pytest.raises(UserError, match=message):
        read_adapter(folder, CONFIG)


def test_numbers_that_are_not_finite_are_refused(folder):
    def poison(tensors):
        tensors[f"base_model.model.{Q}.lora_A.weight"][1, 2] = np.nan

    change_tensors(folder, poison)
    with pytest.raises(UserError, match=r"q_proj\.lora_A\.weight that are not finite"):
        read(folder)


def test_one_tensor_of_experts_that_nothing_names(folder):
    change_tensors(
        folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "base" in n[5:]]
    )
    change(folder, target_parameters=[])
    with pytest.raises(UserError, match=r"which tensor of model\.layers\.1\.feed_forward\.experts"):
        read_adapter(folder, CONFIG)


def test_other_models_files_and_outputs(folder, tmp_path):
    other = from_hf({**HF, "num_hidden_layers": 1}, "test")
    with pytest.raises(UserError, match=r"layers\.1.*no matrix of this model"):
        read_adapter(folder, other)
    with pytest.raises(UserError, match="exists and is not empty"):
        write_adapter(folder, CONFIG, random_adapters())
    with pytest.raises(UserError, match="no adapter to be written"):
        write_adapter(tmp_path / "none", CONFIG, plain_params())
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        read_adapter(folder, CONFIG)
