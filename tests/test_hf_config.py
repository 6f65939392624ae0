"""Every spelling of config.json gives the same config; unknown keys are refused by name."""

import dataclasses
import json

import pytest

from jaxmoe.config import MAVERICK, SCOUT, RopeScaling, VisionConfig, layer_kinds
from jaxmoe.errors import UserError
from jaxmoe.hf_config import SIZES, from_hf, read_config, to_hf
from tests import tiny

SCOUT_HF, MAVERICK_HF = tiny.published_scout(), tiny.published_maverick()


def read(mapping):
    return from_hf(mapping, source="config.json")


def without(mapping, *keys):
    return {key: value for key, value in mapping.items() if key not in keys}


def attention(config):
    return [kind.attention for kind in config.layers]


def feed_forward(config):
    return [kind.feed_forward for kind in config.layers]


def test_published_configs_are_the_presets():
    assert read(SCOUT_HF) == SCOUT
    assert read(MAVERICK_HF) == MAVERICK


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": None, "rope_scaling": None}
        | {"rope_parameters": {"rope_theta": 500000.0, **SCOUT_HF["rope_scaling"]}},
        {"rope_scaling": {"type": "llama3", **without(SCOUT_HF["rope_scaling"], "rope_type")}},
        {"torch_dtype": None, "dtype": "bfloat16"},
        {"attn_temperature_tuning": 4},
        {"attn_temperature_tuning": None},
        {"no_rope_layers": None},
        {"no_rope_layers": [1, 1, 1, 0] * 12},
        {"no_rope_layers": [1, 1, 1, 0] * 13},  # may be longer than the model is deep
        {"layer_types": (["chunked_attention"] * 3 + ["full_attention"]) * 12},
        {"moe_layers": list(range(48)), "interleave_moe_layer_step": 7},
        {"output_attentions": True, "transformers_version": "5.23.0", "id2label": {"0": "A"}},
        {"quantization_config": None},
        {"atention_chunk_size": None, "rope_scaling": {**SCOUT_HF["rope_scaling"], "beta": None}},
    ],
)
def test_spellings_of_scout(changes):
    assert read({**SCOUT_HF, **changes}) == SCOUT


@pytest.mark.parametrize("outer", [7, [7, 8]])
def test_ids_that_end_an_answer_may_stand_around_the_text_config(outer):
    nested = {"model_type": "llama4", "text_config": MAVERICK_HF, "eos_token_id": outer}
    ids = outer if isinstance(outer, list) else [outer]
    assert read(nested).eos_token_ids == (*MAVERICK.eos_token_ids, *ids)
    assert read(nested | {"eos_token_id": None}) == MAVERICK


def test_nested_text_config():
    outer, _ = tiny.nested(SCOUT_HF, {})
    assert read(outer) == dataclasses.replace(SCOUT, image_token_id=127)
    assert from_hf(outer, "config.json", text_only=True) == SCOUT
    outer["vision_config"] = tiny.PUBLISHED_VISION
    assert read(outer) == dataclasses.replace(SCOUT, image_token_id=127, vision=VisionConfig())
    outer["vision_config"] = {**tiny.PUBLISHED_VISION, "rope_theta": None}  # not the text model's
    assert read(outer).vision == VisionConfig()
    assert from_hf(outer, "config.json", text_only=True) == SCOUT


@pytest.mark.parametrize("key", ["image_token_id", "image_token_index"])
def test_the_image_token_is_read_by_both_names(key):
    outer, _ = tiny.nested(SCOUT_HF, {})
    outer = {k: v for k, v in outer.items() if not k.startswith("image_token")} | {key: 77}
    assert read(outer).image_token_id == 77


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", None, "vision_config lacks hidden_size|vision_config gives hidden_size"),
        ("hidden_size", 1400, "hidden_size=1400 is not a multiple of 64"),
        ("image_size", 340, "image_size=340 is not a multiple of 28"),
        ("projector_output_dim", 4000, "projector_output_dim=4000 is not 4096"),
        ("hidden_act", "quick_gelu", 'gives hidden_act the value "quick_gelu"'),
    ],
)
def test_impossible_vision_towers_are_refused(key, value, message):
    outer, _ = tiny.nested(SCOUT_HF, {})
    outer["vision_config"] = {**tiny.PUBLISHED_VISION, key: value}
    with pytest.raises(UserError, match=message):
        read(outer)


def test_no_rope_scaling_keys_mean_no_scaling():
    assert read(without(SCOUT_HF, "rope_scaling")).rope_scaling is None


def test_rope_parameters_of_transformers_5_without_scaling():
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}}
    config = read({**without(SCOUT_HF, "rope_scaling", "rope_theta"), **changes})
    assert (config.rope_theta, config.rope_scaling) == (12345.0, None)


def test_theta_beside_rope_scaling_is_read():
    config = read({**SCOUT_HF, "rope_theta": 10000})
    assert config.rope_theta == 10000.0
    assert config.rope_scaling == RopeScaling()


def test_one_in_no_rope_layers_means_rotary():
    config = read(tiny.scout_like(num_hidden_layers=3, no_rope_layers=[1, 0, 1]))
    assert attention(config) == ["local", "global", "local"]


def test_layer_types_win_over_the_interval():
    types = ["full_attention", "chunked_attention"]
    config = read(tiny.scout_like(num_hidden_layers=2, layer_types=types))
    assert attention(config) == ["global", "local"]


def test_moe_layers_win_over_the_step():
    config = read(tiny.maverick_like(num_hidden_layers=4, moe_layers=[0, 3]))
    assert feed_forward(config) == ["moe", "dense", "dense", "moe"]


@pytest.mark.parametrize(
    "changes", [{"moe_layers": []}, {"interleave_moe_layer_step": 0}], ids=["list", "step"]
)
def test_all_dense_model_needs_no_experts(changes):
    config = read(tiny.scout_like(num_local_experts=0, num_experts_per_tok=0, **changes))
    assert set(feed_forward(config)) == {"dense"}


def test_null_chunk_means_no_chunks():
    assert read({**SCOUT_HF, "attention_chunk_size": None}).attention_chunk_size is None
    assert read(without(SCOUT_HF, "attention_chunk_size")).attention_chunk_size == 8192


def test_temperature_zero_is_off():
    assert not read({**SCOUT_HF, "attn_temperature_tuning": 0}).attn_temperature_tuning


def test_single_eos_id():
    assert read({**SCOUT_HF, "eos_token_id": 2}).eos_token_ids == (2,)


@pytest.mark.parametrize("pad", [None, -1])
def test_missing_pad_lies_in_the_vocabulary(pad):
    assert read(tiny.scout_like(pad_token_id=pad)).pad_token_id < 128
    assert read({**SCOUT_HF, "pad_token_id": pad}).pad_token_id == 200018


@pytest.mark.parametrize("key", [*SIZES, "num_hidden_layers", "num_local_experts"])
def test_missing_sizes_are_refused_by_name(key):
    with pytest.raises(UserError, match=rf"^config\.json lacks {key};"):
        read(without(SCOUT_HF, key))


@pytest.mark.parametrize("key", ["vocab_size", "head_dim", "num_hidden_layers", "floor_scale"])
@pytest.mark.parametrize("value", [0, -1, "5120", True, 1.5, [1], 2**31, 10**39])
def test_absurd_integers_are_refused_by_name(key, value):
    with pytest.raises(UserError, match=rf"^config\.json gives {key} the value "):
        read({**SCOUT_HF, key: value})


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("model_type", "llama"),
        ("model_type", ["llama4_text"]),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", "1e-5"),
        ("attn_scale", float("nan")),
        ("attn_temperature_tuning", "yes"),
        ("attn_temperature_tuning", 2),
        ("tie_word_embeddings", 1),
        ("tie_word_embeddings", -1),
        ("use_qk_norm", 2**31),
        ("attention_bias", 0),
        ("num_hidden_layers", 10**9),
        ("num_local_experts", 2**40),
        ("hidden_size", 2**30),
        ("rms_norm_eps", 1),
        ("rope_theta", 1e300),
        ("rope_theta", float("inf")),
        ("eos_token_id", "2"),
        ("eos_token_id", [1, "2"]),
        ("no_rope_layers", [1, 2] * 24),
        ("no_rope_layers", [1] * 47),
        ("no_rope_layer_interval", 0),
        ("moe_layers", [48]),
        ("moe_layers", ["0"]),
        ("layer_types", ["chunked_attention"] * 47),
        ("layer_types", ["sliding_attention"] * 48),
        ("layer_types", [[]] * 48),
        ("num_experts_per_tok", 0),
        ("rope_scaling", "llama3"),
    ],
)
def test_other_values_are_refused_by_name(key, value):
    with pytest.raises(UserError, match=rf"^config\.json gives {key} the value "):
        read({**SCOUT_HF, key: value})


def test_inconsistent_sizes_name_the_file():
    with pytest.raises(UserError, match=r"^config\.json: num_attention_heads=40 is not a multiple"):
        read({**SCOUT_HF, "num_key_value_heads": 7})


@pytest.mark.parametrize("where", ["text", "nested"])
def test_unknown_keys_are_refused_with_the_nearest_name(where):
    config = {**SCOUT_HF, "atention_chunk_size": 8192}
    if where == "nested":
        config, _ = tiny.nested(config, {})
    with pytest.raises(UserError, match=r"'atention_chunk_size'.*'attention_chunk_size'"):
        read(config)


def test_unknown_keys_are_named_at_once_and_may_be_ignored():
    unknown = {"alpha_window": 1, "beta_window": [2], "gamma_window": None}
    config, _ = tiny.nested({**SCOUT_HF, **unknown}, {})
    config["delta_window"] = 3
    with pytest.raises(UserError) as caught:
        read(config)
    message = str(caught.value)
    assert all(f"'{name}_window'" in message for name in ("alpha", "beta", "delta"))
    assert "gamma" not in message and "--ignore-unknown-config" in message
    assert from_hf(config, "config.json", ignore_unknown=True, text_only=True) == SCOUT
    many = {f"key{n}": "x" * 1000 for n in range(100)} | {"k" * 10_000: 1}
    with pytest.raises(UserError, match="and 91 more") as caught:
        read({**SCOUT_HF, **many})
    assert len(str(caught.value)) < 2000


def test_contradicting_layer_lists_are_refused():
    types = ["full_attention"] * 48
    with pytest.raises(UserError, match=r"layer_types.*no_rope_layers"):
        read({**SCOUT_HF, "layer_types": types, "no_rope_layers": [1, 1, 1, 0] * 12})


@pytest.mark.parametrize("kind", ["yarn", "dynamic", None])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_unknown_rope_types_are_refused_by_name(kind, name):
    changes = {"rope_scaling": None, name: {**SCOUT_HF["rope_scaling"], "rope_type": kind}}
    with pytest.raises(UserError, match=rf"{name} gives rope_type .*llama3"):
        read({**SCOUT_HF, **changes})


@pytest.mark.parametrize(
    "change", [{"factor": 0}, {"factor": None}, {"low_freq_factor": 2}, {"beta_fast": 32}]
)
def test_bad_rope_scaling_is_refused_by_name(change):
    (key,) = change
    with pytest.raises(UserError, match=rf"rope_scaling gives {key} "):
        read({**SCOUT_HF, "rope_scaling": {**SCOUT_HF["rope_scaling"], **change}})


def test_two_rope_spellings_are_refused():
    with pytest.raises(UserError, match=r"rope_scaling .* null beside rope_parameters"):
        read({**SCOUT_HF, "rope_parameters": SCOUT_HF["rope_scaling"]})


@pytest.mark.parametrize("where", ["outer", "text"])
def test_how_matrices_are_stored_changes_no_model(where):
    """`checkpoint/formats/compressed_tensors.py` reads and checks that key."""
    outer, _ = tiny.nested(SCOUT_HF, {})
    expected = read(outer)
    part = outer if where == "outer" else outer["text_config"]
    part["quantization_config"] = {"quant_method": "compressed-tensors"}
    assert read(outer) == expected


@pytest.mark.parametrize(
    "config",
    [
        SCOUT,
        MAVERICK,
        dataclasses.replace(SCOUT, attention_chunk_size=None, tie_word_embeddings=True),
        dataclasses.replace(SCOUT, layers=layer_kinds(5, nope_interval=1, moe_step=9)),
        dataclasses.replace(SCOUT, layers=layer_kinds(3, nope_interval=9)),
        dataclasses.replace(SCOUT, rope_scaling=RopeScaling(factor=8.0, high_freq_factor=4.0)),
        dataclasses.replace(SCOUT, attn_temperature_tuning=False, eos_token_ids=(5,)),
    ],
)
def test_written_configs_are_read_back(config):
    written = json.loads(json.dumps(to_hf(config, "bfloat16")))
    assert read(written) == config
    assert written["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "layers, interval, step",
    [
        (layer_kinds(48), 4, 1),
        (layer_kinds(48, moe_step=2), 4, 2),
        (layer_kinds(3, moe_step=9), 4, 4),  # none: beyond the last layer
        (layer_kinds(8)[1:], None, 1),
    ],
)
def test_written_rules_agree_with_the_lists(layers, interval, step):
    """Some readers only know the rules."""
    written = to_hf(dataclasses.replace(SCOUT, layers=layers), "bfloat16")
    assert written.get("no_rope_layer_interval") == interval
    assert written.get("interleave_moe_layer_step") == step


def test_written_temperature_is_a_bool():
    """Transformers 5 refuses the integer that some published configs have."""
    assert (
        to_hf(read({**SCOUT_HF, "attn_temperature_tuning": 4}), "bfloat16")[
            "attn_temperature_tuning"
        ]
        is True
    )


def test_read_config_reads_the_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SCOUT_HF))
    assert read_config(tmp_path) == SCOUT


@pytest.mark.parametrize("content", [None, "{", "[]", "[" * 100_000, '{"a": %s}' % ("1" * 5000)])
def test_unreadable_config_names_the_file(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path / "config.json")):
        read_config(tmp_path)
