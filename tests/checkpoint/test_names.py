"""The name table covers every tensor and parameter once, and is right in both directions."""

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import pytest

from jaxmoe.checkpoint.formats.tensor_files import Entry, TensorFiles
from jaxmoe.checkpoint.mapping import names, tensors
from jaxmoe.checkpoint.mapping.match import match
from jaxmoe.checkpoint.mapping.tensors import Format, array_shapes, expand
from jaxmoe.config import MAVERICK, SCOUT, VisionConfig
from jaxmoe.errors import UserError
from jaxmoe.hf_config import from_hf
from jaxmoe.model.params import named_specs
from tests import tiny

REAL = {
    "scout": (SCOUT, tiny.published_scout(), 1133),
    "maverick": (MAVERICK, tiny.published_maverick(), 1061),
}
TINY = {"scout": tiny.scout_like(), "maverick": tiny.maverick_like()}
HF = names.TEXT + names.FUSED + names.LAST
HF_FP8 = names.TEXT + names.UNFUSED + names.LAST
META = names.META_TEXT + names.META_VISION


def tiny_config(**overrides):
    return from_hf(tiny.scout_like(num_hidden_layers=1, **overrides), "config.json")


def groups_of(config, rows=HF, formats=None, vision=False, **more):
    config = dataclasses.replace(config, vision=VisionConfig() if vision else None)
    return expand(rows, array_shapes(config, formats or {}), **more)


def shapes_of(groups):
    return {name: shape for group in groups for name, shape in group.tensors.items()}


def hf_names(config):
    return list(shapes_of(groups_of(config)))


def experts_in_fp8(config, layers, ranks=1):
    """The formats of experts in some layers; in Meta's files, `down` has scales for each rank."""
    formats = {}
    for name, spec in named_specs(config).items():
        if names.has_experts(name) and int(name.split(".")[1]) in layers:
            width = spec.matrix_shape[-2] // (ranks if name.endswith("down") else 1)
            formats[name] = Format("fp8", width)
    return formats


@pytest.mark.parametrize("model", REAL)
def test_every_real_tensor_has_a_row_of_its_shape(model):
    config, mapping, count = REAL[model]
    groups = groups_of(config, HF + names.VISION, vision=True)
    shapes = shapes_of(groups)
    assert len(shapes) == count
    text = {name: shape for name, shape in shapes.items() if not names.is_vision(name)}
    assert text == tiny.tensor_shapes(mapping)
    vision = {name: shape for name, shape in shapes.items() if names.is_vision(name)}
    assert vision == tiny.vision_shapes(tiny.PUBLISHED_VISION)


def test_every_tensor_of_the_fp8_maverick():
    formats = experts_in_fp8(MAVERICK, range(48))
    groups = groups_of(MAVERICK, HF_FP8 + names.VISION, formats, vision=True)
    shapes = shapes_of(groups)
    assert len(shapes) == 19445
    expert = "model.layers.47.feed_forward.experts.127."
    assert {name: shape for name, shape in shapes.items() if name.startswith(expert)} == {
        f"{expert}gate_proj.weight": (8192, 5120),
        f"{expert}gate_proj.weight_scale": (8192, 1),
        f"{expert}up_proj.weight": (8192, 5120),
        f"{expert}up_proj.weight_scale": (8192, 1),
        f"{expert}down_proj.weight": (5120, 8192),
        f"{expert}down_proj.weight_scale": (5120, 1),
    }


def test_every_tensor_of_one_of_metas_files():
    """Checks the shapes in the released files for a layer of each kind and the vision tower."""
    scout = shapes_of(groups_of(SCOUT, META, vision=True, ranks=8))
    maverick = shapes_of(groups_of(MAVERICK, META, vision=True, ranks=8))
    experts = "3:layers.5.feed_forward.experts.moe_w_"
    block = "3:vision_embeddings.vision_encoder.transformer.resblocks.33."
    expected = {
        "3:tok_embeddings.weight": (25256, 5120),
        "3:layers.5.attention.wqkv.weight": (896, 5120),
        "3:layers.5.attention.wo.weight": (5120, 640),
        f"{experts}in_eD_F": (81920, 1024),
        f"{experts}swiglu_eD_F": (81920, 1024),
        f"{experts}out_eF_D": (16384, 5120),
        "3:layers.5.feed_forward.w_in_shared_FD.weight": (1024, 5120),
        "3:layers.5.feed_forward.w_out_shared_DF.weight": (5120, 1024),
        "3:vision_embeddings.vision_encoder.conv1._linear.weight": (176, 588),
        f"{block}attn.wq.bias": (176,),
        f"{block}mlp.c_proj.weight": (1408, 704),
        "3:vision_embeddings.vision_adapter.mlp.c_fc.weight": (512, 5632),
        "3:vision_embeddings.vision_adapter.mlp.c_proj.weight": (4096, 512),
        "3:vision_projection.weight": (640, 4096),
    }
    assert expected.items() <= scout.items()
    assert maverick["3:layers.4.feed_forward.mlp.fc1_weight"] == (4096, 5120)
    assert maverick["3:layers.4.feed_forward.mlp.fc2_weight"] == (5120, 2048)


def test_scales_of_metas_fp8_files():
    formats = experts_in_fp8(SCOUT, range(1, 47), ranks=8)
    shapes = shapes_of(groups_of(SCOUT, META, formats, ranks=8))
    assert shapes["2:layers.1.feed_forward.experts.w1.scale"] == (16, 1024)
    assert shapes["2:layers.1.feed_forward.experts.w2.scale"] == (16, 5120)
    assert "2:layers.0.feed_forward.experts.w1.scale" not in shapes


CASES = {
    "hf": (HF, {}),
    "fp8": (HF_FP8, {"fp8": 1}),
    "meta": (META, {"ranks": 8}),
    "meta fp8": (META, {"ranks": 8, "fp8": 8}),
}


@functools.cache
def real_groups(model, case):
    rows, more = CASES[case]
    config = REAL[model][0]
    more = dict(more)
    scales = more.pop("fp8", None)
    formats = experts_in_fp8(config, range(48), scales) if scales else {}
    return config, formats, groups_of(config, rows, formats, **more)


@pytest.mark.parametrize("model", REAL)
@pytest.mark.parametrize("case", CASES)
def test_every_array_is_covered_exactly_once(model, case):
    """The pieces of all groups cover every array and every tensor exactly once."""
    config, formats, groups = real_groups(model, case)
    shapes = array_shapes(config, formats)
    assert sorted(name for group in groups for name in group.params) == sorted(shapes)
    taken = dict.fromkeys(shapes_of(groups), 0)
    for group in groups:
        assert all(shapes[name] == group.shape for name in group.params)
        assert len(group.pieces) * math.prod(group.piece_shape) == math.prod(group.shape)
        assert len({(p.expert, p.origin) for p in group.pieces}) == len(group.pieces)
        for piece in group.pieces:
            taken[piece.tensor] += group.layout.stored_size(group.piece_shape)
    assert taken == {name: math.prod(shape) for name, shape in shapes_of(groups).items()}


@pytest.mark.parametrize("model", REAL)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_of_real_tensors_are_small_and_cover_them_in_order(model, case, itemsize):
    for group in real_groups(model, case)[2]:
        for piece in group.pieces[:: max(1, len(group.pieces) // 9)]:
            end = piece.start
            for block in group.blocks(itemsize, tensor=piece.tensor, expert=piece.expert):
                assert block.start == end
                assert block.count * itemsize <= tensors.BLOCK_BYTES
                assert block.count == math.prod(block.shape) * len(group.params)
                end += block.count
            assert end == piece.start + group.layout.stored_size(group.piece_shape)


@pytest.fixture(params=[700, 5000, 2**30], ids="{} byte blocks".format)
def block_bytes(request, monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK_BYTES", request.param)


def through_blocks(group, weights):
    """A group's parameters, filled block by block from stored tensors."""
    ours = [np.full(group.shape, np.nan, np.float32) for _ in group.params]
    for block in group.blocks(4):
        part = weights[block.tensor].reshape(-1)[block.start : block.start + block.count]
        for array, found in zip(ours, group.layout.split(part, block.shape), strict=True):
            array[block.index] = found.reshape(array[block.index].shape)
    return ours


def back_through_blocks(group, ours):
    return np.concatenate(
        [
            group.layout.join([a[block.index].reshape(block.shape) for a in ours]).reshape(-1)
            for block in group.blocks(4)
        ]
    )


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
    for group in groups_of(config):
        (name,) = group.tensors
        formula = next(formulas[part] for part in formulas if part in name)
        ours = through_blocks(group, weights)
        for array, expected in zip(ours, formula(weights[name]), strict=True):
            np.testing.assert_array_equal(array, expected, err_msg=name)
        np.testing.assert_array_equal(back_through_blocks(group, ours), weights[name].reshape(-1))


def matched(config, given):
    """The result of `match` for files with tensors of these names and the expected shapes."""
    groups = groups_of(config)
    shapes = shapes_of(groups)

    files = TensorFiles()
    files.tensors = {}
    for name in given:
        shape = shapes.get(name.removeprefix("language_model."), ())
        files.tensors[name] = Entry(Path("file"), "F32", shape, 0, 0)
    return match(config, groups, files, "model")


def test_nested_names_and_vision():
    config = tiny_config()
    vision = ["vision_model.class_embedding", "multi_modal_projector.linear_1.weight"]
    nested = [f"language_model.{name}" for name in hf_names(config)]
    found, left_out = matched(config, [*vision, *nested])
    assert list(found) == hf_names(config)
    assert list(found.values()) == nested
    assert left_out == vision


def test_missing_tensor_is_named():
    config = tiny_config()
    given = [name for name in hf_names(config) if "o_proj" not in name]
    with pytest.raises(UserError, match=r"model lacks the tensor .*layers\.0\.self_attn\.o_proj"):
        matched(config, given)


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
        matched(config, [*hf_names(config), unknown])
    assert f"holds the tensor {unknown}," in str(caught.value)
    assert nearest in str(caught.value).partition("nearest")[2]


def test_a_tensor_under_both_names_is_refused():
    config = tiny_config()
    given = [*hf_names(config), "language_model.lm_head.weight"]
    with pytest.raises(UserError, match=r"both lm_head\.weight and language_model\.lm_head"):
        matched(config, given)


def test_tied_head_may_be_there_or_not():
    config = tiny_config(tie_word_embeddings=True)
    assert "lm_head.weight" not in hf_names(config)
    assert matched(config, hf_names(config))[1] == []
    given = [*hf_names(config), "lm_head.weight"]
    assert matched(config, given)[1] == ["lm_head.weight"]
