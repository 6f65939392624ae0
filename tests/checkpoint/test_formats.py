"""Every published format is converted right and exported byte for byte, or refused."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxmoe import LLM
from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import conversion, convert, verify
from jaxmoe.checkpoint.export import export
from jaxmoe.checkpoint.formats import params_json
from jaxmoe.errors import UserError
from jaxmoe.eval.logits import token_logits
from jaxmoe.hf_config import from_hf, read_config
from jaxmoe.mesh import MeshConfig
from pallas_kernels.quantized import QuantizedMatrix
from tests import formats, tiny
from tests.checkpoint.damage import change_metadata, made_old
from tests.checkpoint.sources import assert_same_bytes, read_all
from tests.conftest import one_device
from tests.tiers import slow_after_first

LIKE = {"scout": tiny.scout_like, "maverick": tiny.maverick_like}
SIZES = {"num_hidden_layers": 4, "intermediate_size": 64, "intermediate_size_mlp": 128}
TOKENS = np.random.default_rng(3).integers(0, 128, (2, 40), np.int32)


def model(like, dtype=np.float32):
    config = LIKE[like](**SIZES)
    return config, tiny.random_tensors(config, 4, dtype)


def logits(checkpoint, mesh=None, **more):
    mesh = one_device() if mesh is None else MeshConfig.parse(mesh).make()
    config, params = store.load(checkpoint, mesh, **more)
    with jax.set_mesh(mesh):
        return token_logits(config, params, TOKENS)


def converted(folder, config, tensors, **options):
    tiny.write_checkpoint(folder / "hf", config, tensors)
    convert(folder / "hf", folder / "orbax", **options)
    return folder / "orbax"


# Vision


def test_vision_there_and_back(tmp_path, small_blocks):
    config, tensors = formats.multimodal(*model("scout", ml_dtypes.bfloat16), ml_dtypes.bfloat16)
    orbax = converted(tmp_path, config, tensors)
    export(orbax, tmp_path / "back")
    assert_same_bytes(read_all(tmp_path / "back"), tensors)
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert {**written, "text_config": 0} == {**config, "text_config": 0}
    assert read_config(tmp_path / "back") == read_config(tmp_path / "hf")


def test_text_is_loaded_without_reading_the_tower(tmp_path):
    config, tensors = formats.multimodal(*model("maverick"))
    full = converted(tmp_path / "full", config, tensors)
    text = converted(tmp_path / "text", config, tensors, text_only=True)
    assert not list((text / "state").glob("vision*"))
    for array in (full / "state").glob("vision*"):
        for file in [path for path in array.rglob("*") if path.is_file()]:
            file.unlink()
    np.testing.assert_array_equal(logits(full, text_only=True), logits(text))


def test_text_is_loaded_beside_a_tower_that_cannot_be(tmp_path):
    config, tensors = formats.multimodal(*model("maverick"))
    full = made_old(converted(tmp_path / "full", config, tensors), store.KEY)
    config |= {"vision_config": config["vision_config"] | {"intermediate_size": 97}}
    change_metadata(full, store.KEY, {"outer": config})
    text = converted(tmp_path / "text", config, tensors, text_only=True)
    llm = LLM(full, mesh=one_device(), text_only=True)
    expected, params = store.load(text, one_device())
    assert llm.config == expected == store.read_config(full, text_only=True)
    jax.tree.map(np.testing.assert_array_equal, llm.params, params)
    with pytest.raises(UserError, match="the vision tower's intermediate_size=97 is not 96"):
        LLM(full, mesh=one_device())
    with pytest.raises(UserError, match="the vision tower's intermediate_size=97 is not 96"):
        convert(tmp_path / "text/hf", tmp_path / "out")


def test_a_tower_that_lacks_a_tensor(tmp_path):
    config, tensors = formats.multimodal(*model("scout"))
    del tensors["vision_model.model.layers.1.mlp.fc2.bias"]
    with pytest.raises(UserError, match=r"lacks the tensor vision_model\..*1\.mlp\.fc2"):
        converted(tmp_path, config, tensors)


def test_a_tower_that_the_config_does_not_describe(tmp_path):
    config, tensors = formats.multimodal(*model("scout"))
    del config["vision_config"]
    with pytest.raises(UserError, match="does not describe the vision tower"):
        converted(tmp_path, config, tensors)


# compressed-tensors


def meta_config(like, **changes):
    """A config with the widths that Meta's formula gives."""
    overrides = SIZES | {"intermediate_size_mlp": 128, "attn_scale": 0.1, **changes}
    return LIKE[like](**overrides)


def assert_meta_equals_hf(tmp_path, config, found, ranks, expected, scales=None):
    params = formats.meta_params(config)
    formats.write_meta(tmp_path / "meta", params, found, ranks, scales)
    convert(tmp_path / "meta", tmp_path / "orbax")
    read = store.read_config(tmp_path / "orbax")
    hf = converted(tmp_path / "hf", config, expected)
    context = {"max_position_embeddings": read.max_position_embeddings}
    ids = {key: getattr(read, key) for key in ("bos_token_id", "eos_token_ids", "pad_token_id")}
    assert read == dataclasses.replace(store.read_config(hf), **context, **ids)
    return abs(logits(tmp_path / "orbax") - logits(hf)).max()


def test_meta_with_a_flipped_bit(tmp_path, small_blocks, monkeypatch):
    """It is found before its job is noted as done, so a run with the repaired file resumes.

    The bit belongs to v; q, which is in the same record, is read first.
    """
    monkeypatch.setattr(conversion, "SAMPLE_BYTES", 100)  # not of the data
    config = meta_config("maverick", num_hidden_layers=2)
    found = formats.in_meta(config, tiny.random_tensors(config, 5), ranks=1)
    source = formats.write_meta(tmp_path / "meta", formats.meta_params(config), found, 1)
    file = source / "consolidated.00.pth"
    whole = file.read_bytes()
    data = found["layers.1.attention.wqkv.weight"][0].tobytes()
    damaged = bytearray(whole)
    damaged[whole.index(data) + len(data) - 1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"damaged in the data of layers\.1\.attention\.wqkv"):
        convert(source, tmp_path / "orbax")
    note = json.loads((tmp_path / "orbax.partial/progress.json").read_text())["note"]
    assert "layers.0.attention.v" in note["done"] and "layers.1.attention.q" not in note["done"]
    file.write_bytes(whole)
    assert convert(source, tmp_path / "orbax").resumed
    verify(source, tmp_path / "orbax")  # every byte is the mended file's
    file.write_bytes(damaged)
    with pytest.raises(UserError, match="damaged in the data"):
        verify(source, tmp_path / "orbax")


@pytest.mark.parametrize("like", LIKE)
@pytest.mark.parametrize("ranks", slow_after_first([4, 1]))
def test_meta_equals_hf(tmp_path, small_blocks, like, ranks):
    config = meta_config(like)
    if config["rope_scaling"]:  # Meta's code fixes it
        config["rope_scaling"] = tiny.rope_scaling(original=8192)
    tensors = tiny.random_tensors(config, 5)
    found = formats.in_meta(config, tensors, ranks)
    assert assert_meta_equals_hf(tmp_path, config, found, ranks, tensors) < 1e-5
    export(tmp_path / "orbax", tmp_path / "back")
    assert_same_bytes(read_all(tmp_path / "back"), tensors)


def test_meta_with_vision(tmp_path, small_blocks):
    config = meta_config("maverick")
    tensors = tiny.random_tensors(config, 5, ml_dtypes.bfloat16)
    nested, expected = formats.multimodal(config, tensors, ml_dtypes.bfloat16)
    found = formats.in_meta(config, tensors, 4, expected)
    params = formats.meta_params(config, vision=True)
    formats.write_meta(tmp_path / "meta", params, found, 4)
    convert(tmp_path / "meta", tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "back")
    assert_same_bytes(read_all(tmp_path / "back"), expected)
    report = convert(tmp_path / "meta", tmp_path / "text", text_only=True)
    assert report.left_out > 0
    del nested


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_metas_fp8_equals_what_it_stands_for(tmp_path, small_blocks, ranks):
    config = meta_config("maverick", num_hidden_layers=4, interleave_moe_layer_step=1)
    tensors = tiny.random_tensors(config, 6)
    plain = formats.in_meta(config, tensors, ranks)
    found, scales = formats.to_fp8_mixed(config, plain, ranks)
    meant = dict(tensors)
    for n in (1, 2):
        meant |= meant_experts(config, n, found, scales, ranks)
    assert assert_meta_equals_hf(tmp_path, config, found, ranks, meant, scales) < 1e-4
    _, params = store.load(tmp_path / "orbax", one_device())
    kinds = [type(layer["feed_forward"]["experts"]["gate"]) for layer in params["layers"]]
    assert [kind is QuantizedMatrix for kind in kinds] == [False, True, True, False]


def meant_experts(config, n, found, scales, ranks):
    """A layer's experts in Hugging Face's layout, made from Meta's fp8."""
    E, stem = config["num_local_experts"], f"layers.{n}.feed_forward.experts"

    def whole(name, short, axis):
        parts = [x.astype(np.float32).reshape(E, -1, x.shape[-1]) for x in found[f"{stem}.{name}"]]
        scaled = [
            x * scale[:, None] for x, scale in zip(parts, scales[f"{stem}.{short}"], strict=True)
        ]
        return np.concatenate(scaled, axis=axis)

    gate, up = whole("moe_w_in_eD_F", "w1", 2), whole("moe_w_swiglu_eD_F", "w3", 2)
    hf = f"model.layers.{n}.feed_forward.experts"
    return {
        f"{hf}.gate_up_proj": np.concatenate([gate, up], axis=-1),
        f"{hf}.down_proj": whole("moe_w_out_eF_D", "w2", 1),
    }


@pytest.mark.parametrize(
    "break_it, words",
    [
        ("rank", r"holds 3:tok_embeddings|lacks the tensor|contradicts"),
        ("key", r"params\.json lacks n_heads"),
        ("value", r"params\.json has a value that makes no sense"),
        ("tensor", r"lacks the tensor 2:layers\.1\.attention\.wo\.weight"),
        ("shape", r"consolidated\.02\.pth holds 2:norm\.weight with shape \[32\]"),
    ],
)
def test_bad_meta_folders(tmp_path, break_it, words):
    config = meta_config("maverick")
    found = formats.in_meta(config, tiny.random_tensors(config, 5), 4)
    params = formats.meta_params(config)
    if break_it == "key":
        del params["n_heads"]
    if break_it == "value":
        params["moe_args"] = "many"
    if break_it == "shape":
        found["norm.weight"] = [np.zeros(32 if rank == 2 else 64, np.float32) for rank in range(4)]
    folder = formats.write_meta(tmp_path / "meta", params, found, 4)
    if break_it == "rank":
        (folder / "consolidated.03.pth").unlink()
    if break_it == "tensor":
        mine = {n: parts[2] for n, parts in found.items() if n != "layers.1.attention.wo.weight"}
        mine = {n: x for n, x in mine.items() if isinstance(x, np.ndarray)}
        formats.save_pth(folder / "consolidated.02.pth", mine)
    with pytest.raises(UserError, match=words) as caught:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


# Verification


@pytest.mark.parametrize("weights", [None, "int8"])
def test_verify_finds_any_difference(tmp_path, small_blocks, weights):
    config, tensors = model("maverick")
    orbax = converted(tmp_path, config, tensors, weights=weights)
    seen = []
    verify(tmp_path / "hf", orbax, lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1]
    tensors["model.layers.2.input_layernorm.weight"][5] += 1
    tiny.write_checkpoint(tmp_path / "hf", config, tensors)
    with pytest.raises(UserError, match=r"2\.attention_norm.* differs from its source in \["):
        verify(tmp_path / "hf", orbax)


def test_verify_of_another_source(tmp_path):
    config, tensors = model("maverick")
    orbax = converted(tmp_path, config, tensors)
    tiny.write_checkpoint(tmp_path / "other", config, tensors, shards=2)
    with pytest.raises(UserError, match="was made of other files"):
        verify(tmp_path / "other", orbax)


def test_ranks_that_disagree(tmp_path):
    config = meta_config("maverick")
    found = formats.in_meta(config, tiny.random_tensors(config, 5), 4)
    convert(
        formats.write_meta(tmp_path / "good", formats.meta_params(config), found, 4),
        tmp_path / "orbax",
    )
    verify(tmp_path / "good", tmp_path / "orbax")
    router = "layers.1.feed_forward.router_DE"
    found[router] = [x + (rank == 2) for rank, x in enumerate(found[router])]
    folder = formats.write_meta(tmp_path / "bad", formats.meta_params(config), found, 4)
    convert(folder, tmp_path / "from_bad")
    with pytest.raises(UserError, match=rf"holds 2:{router} with other numbers than 0:{router}"):
        verify(folder, tmp_path / "from_bad")


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"use_scaled_rope": "false"},
            "makes no sense .*use_scaled_rope is neither true nor false",
        ),
        ({"use_qk_norm": 2}, "makes no sense .*use_qk_norm is neither"),
        ({"floor_scale": 8192.5}, "gives floor_scale the value 8192.5"),
        ({"floor_scale": 1e999}, "gives floor_scale the value Infinity"),
        ({"dim": 10**39}, "gives hidden_size the value"),
        ({"dim": 1e999}, "makes no sense"),
        ({"n_layers": 10**9}, "gives num_hidden_layers the value"),
        ({"norm_eps": "x" * 9999}, "gives rms_norm_eps the value"),
    ],
)
def test_params_that_no_model_has(change, words):
    params = formats.meta_params(meta_config("scout")) | change
    with pytest.raises(UserError, match=rf"^params\.json (has a value that )?{words}") as caught:
        from_hf(params_json.to_hf_mapping(params, "params.json"), "params.json")
    assert len(str(caught.value)) < 500


def test_meta_writes_whole_numbers_as_floats():
    params = formats.meta_params(meta_config("scout")) | {"floor_scale": 8192.0}
    assert params_json.to_hf_mapping(params, "params.json")["floor_scale"] == 8192
