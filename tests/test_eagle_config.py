"""A head's config.json is read as it is meant, or refused."""

import pytest

from jaxmoe.config import SCOUT
from jaxmoe.eagle_config import LAYER_IDS, default_layer_ids, eagle_from_hf, eagle_to_hf
from jaxmoe.errors import UserError

SPECFORGE = {  # configs/llama4-scout-17B-16E-eagle3.json
    "architectures": ["LlamaForCausalLMEagle3"],
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 32768,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.3",
    "use_cache": True,
    "vocab_size": 202048,
    "draft_vocab_size": 32000,
}


def read(layer_ids=None, **overrides):
    return eagle_from_hf({**SPECFORGE, **overrides}, "config.json", SCOUT, layer_ids)


def test_a_published_head():
    config, note = read()
    assert (config.head_dim, config.draft_vocab_size) == (128, 32000)
    assert config.layer_ids == default_layer_ids(48) == (2, 24, 45)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert "2,24,45" in note


@pytest.mark.parametrize("place", [{}, {"eagle_config": {LAYER_IDS: [1, 23, 44]}}])
def test_both_conventions_of_layer_ids_are_told_apart(place):
    """By the first: 1 is read after its layer, 2 before."""
    given = place or {LAYER_IDS: [1, 23, 44]}
    config, note = read(**given)
    assert config.layer_ids == (2, 24, 45) and "outputs" in note
    config, note = read(**{LAYER_IDS: [2, 20, 40]})
    assert config.layer_ids == (2, 20, 40) and "outputs" not in note


def test_other_layer_ids_have_to_be_given():
    with pytest.raises(UserError, match=r"names the layers 4,20,40.*--layer-ids 5,21,41"):
        read(**{LAYER_IDS: [4, 20, 40]})
    assert read(**{LAYER_IDS: [4, 20, 40]}, layer_ids=(5, 21, 41))[0].layer_ids == (5, 21, 41)
    with pytest.raises(UserError, match="has 3 ids from 0 to 48"):
        read(layer_ids=(2, 24, 49))


REFUSED = [
    ({"architectures": ["LlamaForCausalLM"]}, "an EAGLE-3 head"),
    ({"num_hidden_layers": 2}, "num_hidden_layers the value 2; expected 1"),
    ({"attention_bias": True}, "attention_bias"),
    ({"fc_norm": True}, "fc_norm"),
    ({"norm_output": True}, "norm_output"),
    ({"eagle_config": {"norm_before_fc": True}}, "norm_before_fc"),
    ({"eagle_config": {"use_last_layernorm": False}}, "use_last_layernorm"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.*not supported"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type"),
    ({"mystery": 1}, "'mystery'"),
    ({"hidden_size": 4096}, "hidden_size 4096, but its target has 5120"),
    ({"vocab_size": 128256}, "vocab_size 128256, but its target has 202048"),
    ({"draft_vocab_size": 300000}, "more than vocab_size"),
    ({"num_key_value_heads": 7}, "not a multiple"),
    ({LAYER_IDS: [2, 24]}, "3 ids"),
]


@pytest.mark.parametrize("overrides, message", REFUSED)
def test_what_is_not_supported_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        read(**overrides)


@pytest.mark.parametrize("ids", [None, (2, 10, 40)])
def test_what_is_written_is_read_back(ids):
    config, _ = read(layer_ids=ids, norm_before_residual=True)
    assert eagle_from_hf(eagle_to_hf(config, 48, "bfloat16"), "again", SCOUT)[0] == config


def test_layer_ids_that_could_be_misread_are_not_written():
    with pytest.raises(UserError, match="let the first be 2"):
        eagle_to_hf(read(layer_ids=(1, 10, 40))[0], 48, "bfloat16")
