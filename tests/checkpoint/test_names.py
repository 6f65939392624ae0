"""The name table: one to one, whole, and the same weights in both directions."""

import math

import numpy as np
import pytest

from jaxmoe.checkpoint import names
from jaxmoe.checkpoint.names import match_names, stored_tensors
from jaxmoe.config import MAVERICK, SCOUT
from jaxmoe.errors import UserError
from jaxmoe.hf_config import from_hf
from jaxmoe.model.params import named_specs
from tests import tiny

REAL = {
    "scout": (SCOUT, tiny.published_scout(), 579),
    "maverick": (MAVERICK, tiny.published_maverick(), 507),
}
TINY = {"scout": tiny.scout_like(), "maverick": tiny.maverick_like()}


def tiny_config(**overrides):
    return from_hf(tiny.scout_like(num_hidden_layers=1, **overrides), "config.json")


def hf_names(config):
    return [tensor.name for tensor in stored_tensors(config)]


@pytest.mark.parametrize("model", REAL)
def test_every_real_tensor_has_a_row_of_its_shape(model):
    config, mapping, count = REAL[model]
    shapes = {tensor.name: tensor.stored_shape for tensor in stored_tensors(config)}
    assert len(shapes) == count
    assert shapes == tiny.tensor_shapes(mapping)


@pytest.mark.parametrize("model", REAL)
def test_every_parameter_is_in_exactly_one_tensor(model):
    config, _, _ = REAL[model]
    tensors = stored_tensors(config)
    ours = [name for tensor in tensors for name in tensor.ours]
    specs = named_specs(config)
    assert sorted(ours) == sorted(specs)
    assert all(specs[name].shape == tensor.shape for tensor in tensors for name in tensor.ours)


@pytest.mark.parametrize("model", REAL)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_of_real_tensors_are_small_and_cover_them_in_order(model, itemsize):
    for tensor in stored_tensors(REAL[model][0]):
        end = 0
        for block in tensor.blocks(itemsize):
            assert block.start == end
            assert block.count * itemsize <= names.BLOCK_BYTES
            assert block.count == math.prod(block.shape) * len(tensor.ours)
            end += block.count
        assert end == math.prod(tensor.stored_shape)


@pytest.fixture(params=[700, 5000, 2**30], ids="{} byte blocks".format)
def block_bytes(request, monkeypatch):
    monkeypatch.setattr(names, "BLOCK_BYTES", request.param)


def through_blocks(tensor, stored):
    """Our parameters, filled block by block from a stored tensor."""
    ours = [np.full(tensor.shape, np.nan, stored.dtype) for _ in tensor.ours]
    flat = stored.reshape(-1)
    for block in tensor.blocks(stored.itemsize):
        part = flat[block.start : block.start + block.count]
        for array, piece in zip(ours, tensor.layout.split(part, block.shape), strict=True):
            array[block.index] = piece
    return ours


def back_through_blocks(tensor, ours):
    axes = tensor.layout.stored_axes(len(tensor.shape))
    pieces = [
        tensor.layout.join([array[block.index].transpose(axes) for array in ours]).reshape(-1)
        for block in tensor.blocks(ours[0].itemsize)
    ]
    return np.concatenate(pieces).reshape(tensor.stored_shape)


@pytest.mark.parametrize("model", TINY)
def test_blocks_give_the_weights_that_the_formulas_give(model, block_bytes):
    config = from_hf(TINY[model], "config.json")
    weights = tiny.random_tensors(TINY[model], seed=0)
    D, H, K, d = 64, 8, 4, 16
    F = config.intermediate_size
    formulas = {
        "embed_tokens": lambda w: [w],
        "layernorm": lambda w: [w],
        "norm": lambda w: [w],
        "q_proj": lambda w: [w.T.reshape(D, H, d)],
        "k_proj": lambda w: [w.T.reshape(D, K, d)],
        "v_proj": lambda w: [w.T.reshape(D, K, d)],
        "o_proj": lambda w: [w.T.reshape(H, d, D)],
        "gate_up_proj": lambda w: [w[..., :F], w[..., F:]],
        "experts.down_proj": lambda w: [w],
        "": lambda w: [w.T],
    }
    for tensor in stored_tensors(config):
        formula = next(formulas[part] for part in formulas if part in tensor.name)
        ours = through_blocks(tensor, weights[tensor.name])
        for array, expected in zip(ours, formula(weights[tensor.name]), strict=True):
            np.testing.assert_array_equal(array, expected, err_msg=tensor.name)
        np.testing.assert_array_equal(back_through_blocks(tensor, ours), weights[tensor.name])


def test_nested_names_and_vision():
    config = tiny_config()
    vision = ["vision_model.class_embedding", "multi_modal_projector.linear_1.weight"]
    nested = [f"language_model.{name}" for name in hf_names(config)]
    found = match_names(config, [*vision, *nested], "model")
    assert list(found.names) == hf_names(config)
    assert list(found.names.values()) == nested
    assert found.left_out == vision


def test_missing_tensor_is_named():
    config = tiny_config()
    given = [name for name in hf_names(config) if "o_proj" not in name]
    with pytest.raises(UserError, match=r"model lacks the tensor .*layers\.0\.self_attn\.o_proj"):
        match_names(config, given, "model")


@pytest.mark.parametrize(
    "unknown, nearest",
    [
        ("model.layers.1.input_layernorm.weight", "model.layers.0.input_layernorm.weight"),
        ("language_model.model.layers.0.self_attn.q_norm.weight", "self_attn.q_proj"),
        ("model.layers.0.feed_forward.router.bias", "feed_forward.router.weight"),
        ("visionmodel.class_embedding", "model"),
    ],
)
def test_unknown_tensor_is_named_with_the_nearest(unknown, nearest):
    config = tiny_config()
    with pytest.raises(UserError) as caught:
        match_names(config, [*hf_names(config), unknown], "model")
    assert f"holds the tensor {unknown}," in str(caught.value)
    assert nearest in str(caught.value).partition("nearest")[2]


def test_a_tensor_under_both_names_is_refused():
    config = tiny_config()
    given = [*hf_names(config), "language_model.lm_head.weight"]
    with pytest.raises(UserError, match=r"both lm_head\.weight and language_model\.lm_head"):
        match_names(config, given, "model")


def test_tied_head_may_be_there_or_not():
    config = tiny_config(tie_word_embeddings=True)
    assert "lm_head.weight" not in hf_names(config)
    assert match_names(config, hf_names(config), "model").left_out == []
    given = [*hf_names(config), "lm_head.weight"]
    assert match_names(config, given, "model").left_out == ["lm_head.weight"]
