"""What cannot be converted is refused in one sentence, and nothing is left of it."""

import os
import time

import numpy as np
import pytest

from jaxmoe.checkpoint.convert import convert, verify
from jaxmoe.checkpoint.convert import source as source_module
from jaxmoe.errors import UserError
from tests.checkpoint.sources import CONFIG, FLOATS, checkpoint, weights

SHARD = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_named(tmp_path, dtype, value):
    tensors = weights(dtype)
    tensors["lm_head.weight"][33, 7] = value
    source = source_module.open_source(checkpoint(tmp_path, CONFIG, tensors))
    source.read("lm_head.weight", 0, 33 * 64 + 7)
    source.read("lm_head.weight", 33 * 64 + 8, 1000)
    with pytest.raises(
        UserError, match=rf"safetensors holds lm_head\.weight with {value} at \[33, 7"
    ):
        source.read("lm_head.weight", 100, 33 * 64)


def test_what_is_no_number_is_neither_converted_nor_verified(tmp_path, monkeypatch):
    name = "model.layers.1.feed_forward.experts.gate_up_proj"
    tensors = weights("bfloat16")
    tensors[name][2, 33, 7] = np.nan
    source = checkpoint(tmp_path / "hf", CONFIG, tensors)
    words = rf"model\.safetensors holds {name} with nan at \[2, 33, 7\]"
    for quantize in (None, "int8"):
        with pytest.raises(UserError, match=words):
            convert(source, tmp_path / f"{quantize}", weights=quantize)
    with monkeypatch.context() as before:
        before.setattr(source_module, "_has_nonfinite", lambda *_: False)
        convert(source, tmp_path / "orbax")
    with pytest.raises(UserError, match=words):
        verify(source, tmp_path / "orbax")


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 4096},
        {"num_local_experts": 65536},
        {"hidden_size": 2**18, "intermediate_size": 2**22},
    ],
)
def test_sizes_beyond_the_files_are_refused_at_once(tmp_path, change):
    source = checkpoint(tmp_path / "hf", {**CONFIG, **change})
    start = time.process_time()
    with pytest.raises(UserError, match=r"config\.json describes .* holds \d+ (tensors|bytes)"):
        convert(source, tmp_path / "orbax")
    assert time.process_time() - start < 2


@pytest.mark.parametrize("name", ["x" * 250, "x" * 300, "\0", "\ud800"])
def test_names_that_no_folder_can_have(tmp_path, name):
    source = checkpoint(tmp_path / "hf")
    with pytest.raises(UserError, match="cannot be written: "):
        convert(source, f"{tmp_path}/{name}")


def assert_nothing_left(tmp_path):
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def refused(tmp_path, *parts):
    """Asserts that converting `hf` fails with a sentence that has `parts`, and leaves nothing."""
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "hf", tmp_path / "out")
    message = str(caught.value)
    assert all(str(part) in message for part in parts), message
    assert "\n" not in message and message.endswith(".")
    assert_nothing_left(tmp_path)


def test_wrong_shape_names_tensor_and_both_shapes(tmp_path):
    tensors = weights()
    name = "model.layers.1.feed_forward.experts.down_proj"
    tensors[name] = tensors[name].transpose(0, 2, 1)[:, :, :60].copy()
    checkpoint(tmp_path / "hf", CONFIG, tensors)
    refused(tmp_path, "model.safetensors", name, "[8, 64, 60]", "[8, 64, 64]")


def test_transposed_router_is_a_wrong_shape(tmp_path):
    tensors = weights()
    name = "model.layers.1.feed_forward.router.weight"
    tensors[name] = tensors[name].T.copy()
    checkpoint(tmp_path / "hf", CONFIG, tensors)
    refused(tmp_path, name, "[64, 8]", "[8, 64]")


def test_unknown_tensor(tmp_path):
    tensors = weights() | {"model.layers.0.feed_forward.router.weight": np.zeros((8, 64))}
    checkpoint(tmp_path / "hf", CONFIG, tensors)
    refused(tmp_path, tmp_path / "hf", "model.layers.0.feed_forward.router.weight")


def test_missing_tensor(tmp_path):
    tensors = weights()
    del tensors["model.norm.weight"]
    checkpoint(tmp_path / "hf", CONFIG, tensors)
    refused(tmp_path, tmp_path / "hf", "lacks the tensor model.norm.weight")


def test_dtype_that_cannot_be_read(tmp_path):
    tensors = weights() | {"model.norm.weight": np.zeros(64, np.float64)}
    checkpoint(tmp_path / "hf", CONFIG, tensors)
    refused(tmp_path, "model.safetensors", "model.norm.weight", "F64")


def test_unknown_rope_type(tmp_path):
    checkpoint(tmp_path / "hf", {**CONFIG, "rope_scaling": {"rope_type": "yarn"}})
    refused(tmp_path, "config.json", "yarn")


def test_missing_shard(tmp_path):
    (checkpoint(tmp_path / "hf", shards=3) / SHARD).unlink()
    refused(tmp_path, SHARD)


def test_truncated_shard(tmp_path):
    shard = checkpoint(tmp_path / "hf", shards=3) / SHARD
    os.truncate(shard, shard.stat().st_size - 1)
    refused(tmp_path, SHARD)


def test_disk_too_small_is_refused_before_writing(tmp_path, monkeypatch):
    checkpoint(tmp_path / "hf")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("jaxmoe.files.atomic.shutil.disk_usage", lambda _: usage)
    refused(tmp_path, tmp_path, "bytes free, but")
