"""Every published format: what it stands for, byte for byte there and back, or one refusal."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors

from jaxmoe.checkpoint import arrays, store
from jaxmoe.checkpoint import tensors as stored_tensors
from jaxmoe.checkpoint.convert import convert, verify
from jaxmoe.checkpoint.export import export
from jaxmoe.checkpoint.reader import DTYPES
from jaxmoe.errors import UserError
from jaxmoe.evaluate import token_logits
from jaxmoe.hf_config import read_config
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.params import named_params, quantize_params
from pallas_kernels.quantized import QuantizedMatrix
from tests import formats, tiny
from tests.conftest import one_device

LIKE = {"scout": tiny.scout_like, "maverick": tiny.maverick_like}
SIZES = {"num_hidden_layers": 4, "intermediate_size": 64, "intermediate_size_mlp": 128}
TOKENS = np.random.default_rng(3).integers(0, 128, (2, 40), np.int32)


@pytest.fixture
def small_blocks(monkeypatch):
    """As for real sizes, every tensor is written in several blocks of several chunks."""
    monkeypatch.setattr(stored_tensors, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 1000)


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


def read_all(folder):
    """By the safetensors library, whose NumPy side knows no float8."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in safetensors.deserialize(file.read_bytes()):
            found[name] = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]])
            found[name] = found[name].reshape(tensor["shape"])
    return found


def assert_same_bytes(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert got[name].tobytes() == tensor.tobytes(), name


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
    np.testing.assert_array_equal(logits(full), logits(text))


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


def test_groups_that_cannot_be_paired(tmp_path):
    described, stored, _ = formats.in_w4a16(*model("maverick"))
    name = "model.layers.0.feed_forward.gate_proj.weight_scale"
    stored[name] = np.ones((128, 64), stored[name].dtype)  # a scale for every input
    with pytest.raises(UserError, match="with these scales"):
        converted(tmp_path, described, stored)


@pytest.mark.parametrize("like", LIKE)
@pytest.mark.parametrize("make", [formats.in_fp8, formats.in_w4a16])
def test_quantized_means_the_same(tmp_path, small_blocks, like, make):
    """Equal to the model of the numbers that it stands for."""
    config, tensors = model(like)
    described, stored, meant = make(config, tensors)
    quantized = converted(tmp_path / "quantized", described, stored)
    plain = converted(tmp_path / "plain", config, meant)
    _, params = store.load(quantized, one_device())
    experts = params["layers"][3]["feed_forward"]["experts"]
    assert all(isinstance(w, QuantizedMatrix) for w in experts.values())
    assert isinstance(params["layers"][3]["attention"]["q"], jax.Array)
    expected = logits(plain)
    assert abs(logits(quantized) - expected).max() < 1e-4
    assert abs(logits(quantized, "expert=2,fsdp=2,tensor=2") - expected).max() < 1e-4


def test_fp8_there_and_back(tmp_path, small_blocks):
    """Values and scales keep their bytes, in a multimodal checkpoint, too."""
    text, stored, _ = formats.in_fp8(*model("maverick", ml_dtypes.bfloat16))
    described = text.pop("quantization_config")
    config, tensors = formats.multimodal(text, stored, ml_dtypes.bfloat16)
    orbax = converted(tmp_path, config | {"quantization_config": described}, tensors)
    export(orbax, tmp_path / "back")
    assert_same_bytes(read_all(tmp_path / "back"), tensors)
    written = json.loads((tmp_path / "back/config.json").read_text())["quantization_config"]
    assert written["format"] == "float-quantized"
    assert "language_model.lm_head" in written["ignore"]
    assert not any(".experts." in name for name in written["ignore"])
    convert(tmp_path / "back", tmp_path / "again")
    np.testing.assert_array_equal(logits(tmp_path / "again"), logits(orbax))


@pytest.mark.parametrize("make", [formats.in_fp8, formats.in_w4a16])
def test_widened(tmp_path, small_blocks, make):
    """By the conversion or by the export: the numbers that it stands for, rounded once."""
    config, tensors = model("maverick")
    described, stored, meant = make(config, tensors)
    kept = converted(tmp_path / "kept", described, stored)
    converted(tmp_path / "widened", described, stored, weights="bf16")
    export(tmp_path / "widened/orbax", tmp_path / "first")
    export(kept, tmp_path / "last", weights="bf16")
    first, last = read_all(tmp_path / "first"), read_all(tmp_path / "last")
    assert_same_bytes(first, last)
    for name, w in meant.items():
        rounds = stored.get(name) is not w
        expected = w.astype(ml_dtypes.bfloat16) if rounds else w
        assert_same_bytes({name: first[name]}, {name: expected})


@pytest.mark.parametrize("weights", ["fp8", "int8", "int4"])
def test_quantized_on_the_way(tmp_path, small_blocks, weights):
    """As `quantize_params` does it, to the bit; and every matrix is covered."""
    config, tensors = model("maverick")
    tiny.write_checkpoint(tmp_path / "hf", config, tensors)
    report = convert(tmp_path / "hf", tmp_path / "quantized", weights=weights)
    convert(tmp_path / "hf", tmp_path / "plain")
    loaded, params = store.load(tmp_path / "plain", one_device())
    expected = named_params(loaded, quantize_params(loaded, params, weights))
    found = named_params(loaded, store.load(tmp_path / "quantized", one_device())[1])
    for name, (spec, w) in expected.items():
        assert isinstance(w, QuantizedMatrix) == spec.quantizable
        for a, b in zip(jax.tree.leaves(w), jax.tree.leaves(found[name][1]), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)
    kinds = {"attention.q", "feed_forward.experts.down", "feed_forward.shared.up"}
    assert kinds <= report.errors.keys()
    numbers = sum(np.prod(spec.shape) for spec, _ in expected.values() if spec.quantizable)
    assert sum(error.count for error in report.errors.values()) == numbers
    largest = {"fp8": 0.04, "int8": 0.01, "int4": 0.15}[weights]
    assert all(0 < (e.lost / e.total) ** 0.5 < largest for e in report.errors.values())


def test_fp8_is_kept_when_fp8_is_asked_for(tmp_path):
    """Its scales are the publisher's; what was plain is quantized."""
    described, stored, _ = formats.in_fp8(*model("maverick"))
    orbax = converted(tmp_path, described, stored, weights="fp8")
    _, params = store.load(orbax, one_device())
    expert = params["layers"][1]["feed_forward"]["experts"]["gate"]
    name = "model.layers.1.feed_forward.experts.2.gate_proj.weight"
    np.testing.assert_array_equal(np.asarray(expert.qvalue[2]), stored[name])
    assert isinstance(params["layers"][1]["attention"]["q"], QuantizedMatrix)


def test_interrupted_quantization_goes_on(tmp_path, small_blocks):
    config, tensors = model("scout")
    once = converted(tmp_path / "once", config, tensors, weights="int4")

    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    tiny.write_checkpoint(tmp_path / "hf", config, tensors)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "hf", tmp_path / "twice", interrupt, weights="int4")
    convert(tmp_path / "hf", tmp_path / "twice", weights="int4")

    def files(folder):
        found = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}

    assert files(tmp_path / "twice") == files(once)


def test_saved_quantized_parameters_are_loaded(tmp_path):
    described, stored, _ = formats.in_fp8(*model("maverick"))
    orbax = converted(tmp_path, described, stored)
    config, params = store.load(orbax, one_device())
    store.save(tmp_path / "saved", config, params)
    np.testing.assert_array_equal(logits(tmp_path / "saved"), logits(orbax))


def test_quantized_with_other_dtype(tmp_path):
    """Only what is plain is cast."""
    described, stored, _ = formats.in_fp8(*model("maverick", ml_dtypes.bfloat16))
    _, params = store.load(converted(tmp_path, described, stored), one_device(), "float32")
    expert = params["layers"][1]["feed_forward"]["experts"]["gate"]
    assert (expert.qvalue.dtype, expert.scale.dtype) == (jnp.float8_e4m3fn, jnp.float32)
    assert params["embed"].dtype == jnp.float32


def says(**changes):
    return {"config_groups": {"a": {"weights": {"type": "float", "num_bits": 8} | changes}}}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"quant_method": "fbgemm_fp8"}, "quant_method 'fbgemm_fp8'"),
        ({"format": "marlin-24"}, "format 'marlin-24'"),
        ({"config_groups": {"a": {"weights": {"symmetric": False}}}}, "zero points"),
        ({"config_groups": {"a": {"weights": {"actorder": "group"}}}}, "actorder 'group'"),
        (
            says(type="int"),
            "int8, but layers.1.feed_forward.experts.down is in fp8",
        ),
        (says(num_bits=4), "float weights of 4 bits"),
        (None, "has no quantization_config, but layers.1.feed_forward.experts.down is quantized"),
    ],
)
def test_bad_quantization_configs(tmp_path, change, words):
    described, stored, _ = formats.in_fp8(*model("maverick"))
    if change is None:
        del described["quantization_config"]
    else:
        described["quantization_config"] |= change
    with pytest.raises(UserError, match=words):
        converted(tmp_path, described, stored)


def test_a_config_that_says_quantized_of_plain_tensors(tmp_path):
    config, tensors = model("maverick")
    described, _, _ = formats.in_fp8(config, tensors)
    with pytest.raises(UserError, match="says that matrices are quantized, but none is"):
        converted(tmp_path, described, tensors)


def test_plain_experts_beside_quantized_ones_are_named(tmp_path):
    """Layer 1 is plain: a reader must not look for its scales."""
    config, tensors = model("maverick")
    described, stored, _ = formats.in_fp8(config, tensors)
    plain = formats.unfused(config, tensors)
    for name in [name for name in stored if "layers.1." in name and ".experts." in name]:
        del stored[name]
    stored |= {n: w for n, w in plain.items() if "layers.1." in n and ".experts." in n}
    export(converted(tmp_path, described, stored), tmp_path / "back")
    assert_same_bytes(read_all(tmp_path / "back"), stored)
    written = json.loads((tmp_path / "back/config.json").read_text())["quantization_config"]
    experts = {name for name in written["ignore"] if ".experts." in name}
    assert experts == {n.removesuffix(".weight") for n in plain if "1.feed_forward.experts." in n}


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("model.layers.0.input_layernorm.weight", np.int32),
        ("model.layers.0.self_attn.q_proj.weight", formats.FP8),
        ("model.layers.3.feed_forward.experts.2.gate_proj.weight", np.float32),
        ("model.layers.3.feed_forward.experts.2.gate_proj.weight_scale", np.float32),
    ],
)
def test_dtypes_that_do_not_fit(tmp_path, name, dtype):
    described, stored, _ = formats.in_fp8(*model("maverick"))
    stored[name] = stored[name].astype(dtype)
    with pytest.raises(UserError, match=rf"holds {name} as .* is expected"):
        converted(tmp_path, described, stored)
    assert not (tmp_path / "orbax.partial").exists()


@pytest.mark.parametrize("break_it", ["scale", "expert", "dtype"])
def test_bad_quantized_tensors(tmp_path, break_it):
    described, stored, _ = formats.in_fp8(*model("maverick"))
    name = "model.layers.1.feed_forward.experts.3.up_proj.weight"
    words = name
    if break_it == "scale":
        del stored[f"{name}_scale"]
        words = f"{name}_scale"
    elif break_it == "expert":
        del stored[name]
    else:
        first = "model.layers.1.feed_forward.experts.0.up_proj.weight"
        stored[first] = stored[first].astype(np.float32)
        words = "experts.0.up_proj.weight_scale, but its weight is no matrix"
    with pytest.raises(UserError, match=words):
        converted(tmp_path, described, stored)


# Meta


def meta_config(like, **changes):
    """With the widths that Meta's formula gives."""
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


@pytest.mark.parametrize("like", LIKE)
@pytest.mark.parametrize("ranks", [1, 4])
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
    """A layer's experts as Hugging Face has them, out of Meta's fp8."""
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
