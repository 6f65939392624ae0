"""Quantized checkpoints have the right numbers and keep their bytes, or are refused."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import convert, verify
from jaxmoe.checkpoint.export import export
from jaxmoe.errors import UserError
from jaxmoe.model.params import named_params, quantize_params
from pallas_kernels.quantized import QuantizedMatrix
from tests import formats, tiny
from tests.checkpoint.test_formats import (
    assert_same_bytes,
    converted,
    logits,
    model,
    read_all,
)
from tests.conftest import one_device
from tests.tiers import slow_after_first


def test_groups_that_cannot_be_paired(tmp_path):
    described, stored, _ = formats.in_w4a16(*model("maverick"))
    name = "model.layers.0.feed_forward.gate_proj.weight_scale"
    stored[name] = np.ones((128, 64), stored[name].dtype)  # a scale for every input
    with pytest.raises(UserError, match="with these scales"):
        converted(tmp_path, described, stored)


@pytest.mark.parametrize(
    "like, make",
    slow_after_first(
        [
            ("maverick", formats.in_fp8_blocks),
            ("scout", formats.in_fp8_tensors),
            ("maverick", formats.in_fp8),
            ("scout", formats.in_w4a16),
        ]
    ),
)
def test_quantized_means_the_same(tmp_path, small_blocks, like, make):
    """The logits equal those of the model with the dequantized numbers."""
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
    """Values and scales keep their bytes, also in a multimodal checkpoint."""
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [formats.in_fp8, formats.in_w4a16, formats.in_fp8_blocks, formats.in_fp8_tensors]
)
def test_widened(tmp_path, small_blocks, make):
    """Both the conversion and the export widen to the dequantized numbers, rounded once."""
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
    """Every matrix is quantized to the bit as by `quantize_params`."""
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


def test_scales_of_activations_are_left_out_with_a_sentence(tmp_path):
    """A scale of a whole matrix becomes one per output, and is exported so."""
    described, stored, _ = formats.in_fp8_tensors(*model("maverick"))
    source = tiny.write_checkpoint(tmp_path / "hf", described, stored)
    report = convert(source, tmp_path / "orbax")
    others = {name for name in stored if name.endswith((".k_scale", ".v_scale", ".input_scale"))}
    assert report.left_out == len(others)
    assert report.notes[0].startswith(f"{len(others)} scales of activations")
    verify(source, tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "back")
    back = read_all(tmp_path / "back")
    name = "model.layers.1.feed_forward.experts.3.up_proj.weight"
    np.testing.assert_array_equal(back[f"{name}_scale"], np.full((64, 1), stored[f"{name}_scale"]))
    assert back[name].tobytes() == stored[name].tobytes()


@pytest.mark.parametrize("block", [(64, 64), (32, 48), [128], None])
def test_blocks_that_are_not_those_of_the_scales(tmp_path, block):
    described, stored, _ = formats.in_fp8_blocks(*model("maverick"))
    weights = described["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights["block_structure"] = block and list(block)
    with pytest.raises(UserError, match=r"with these scales|with block_structure .* a pair"):
        converted(tmp_path, described, stored)


def test_modelopt_is_named(tmp_path):
    """ModelOpt's first releases have a file beside a config.json that does not mention it."""
    config, tensors = model("maverick")
    source = tiny.write_checkpoint(tmp_path, config, tensors)
    (source / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(UserError, match=r"hf_quant_config\.json says .* ModelOpt; only compressed"):
        convert(source, tmp_path / "orbax")


def test_fp8_is_kept_when_fp8_is_asked_for(tmp_path):
    """The publisher's scales are kept, and matrices that were not quantized become fp8."""
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
    """Only parameters that are not quantized are cast."""
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
        (says(strategy="tensor_group"), "strategy 'tensor_group'"),
        ({"format": "pack-quantized"} | says(type="int"), r"packed in words \(W8A16\)"),
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
    """Layer 1 is not quantized, so it has no scales."""
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
