"""Converting and exporting keeps every byte, and nothing unfinished looks finished."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmoe.checkpoint import export as export_module
from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import convert, verify
from jaxmoe.checkpoint.convert import source as source_module
from jaxmoe.checkpoint.export import export
from jaxmoe.errors import UserError
from jaxmoe.hf_config import read_config
from tests import tiny

ROOT = Path(__file__).parents[2]
CONFIG = tiny.maverick_like(num_hidden_layers=4)  # dense and MoE, local and global
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float16": np.float16}
SHARD = "model-00002-of-00003.safetensors"


def weights(dtype="float32", config=CONFIG):
    tensors = tiny.random_tensors(config, seed=1, dtype=DTYPES[dtype])
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    return tensors


def checkpoint(folder, config=CONFIG, tensors=None, shards=1):
    return tiny.write_checkpoint(folder, config, tensors or weights(), shards)


def read_all(folder):
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def assert_same_bytes(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert got[name].tobytes() == tensor.tobytes(), name


def there_and_back(tmp_path, source):
    convert(source, tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "back")
    return tmp_path / "back"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip_is_byte_identical(tmp_path, small_blocks, dtype, shards):
    tensors = weights(dtype)
    config = {**CONFIG, "torch_dtype": dtype}
    back = there_and_back(tmp_path, checkpoint(tmp_path / "hf", config, tensors, shards))
    assert_same_bytes(read_all(back), tensors)
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == dtype
    assert read_config(back) == read_config(tmp_path / "hf")


def test_round_trip_keeps_every_finite_pattern_and_zeros(tmp_path):
    tensors = weights("bfloat16")
    pattern = np.arange(tensors["lm_head.weight"].size, dtype=np.uint16) * 7
    pattern[pattern & 0x7F80 == 0x7F80] = 0x8000
    tensors["lm_head.weight"] = pattern.view(DTYPES["bfloat16"]).reshape(128, 64)
    tensors["model.norm.weight"] = np.zeros(64, DTYPES["bfloat16"])  # the arrays' fill value
    back = there_and_back(tmp_path, checkpoint(tmp_path / "hf", CONFIG, tensors))
    assert_same_bytes(read_all(back), tensors)


@pytest.mark.parametrize("dtype", DTYPES)
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


def test_round_trip_of_mixed_dtypes(tmp_path):
    tensors = weights("bfloat16")
    for name in tensors:
        if "router" in name or "norm" in name:
            tensors[name] = tensors[name].astype(np.float32)
    back = there_and_back(tmp_path, checkpoint(tmp_path / "hf", CONFIG, tensors))
    assert_same_bytes(read_all(back), tensors)


@pytest.mark.parametrize(
    "embed, rest, stated, main",
    [
        ("float32", "bfloat16", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", None, "bfloat16"),
        ("bfloat16", "float32", "float32", "float32"),
        ("bfloat16", "float32", "bfloat16", "bfloat16"),
        ("bfloat16", "bfloat16", "float32", "bfloat16"),  # of which there is nothing
    ],
)
def test_the_dtype_of_a_model_is_not_that_of_its_embedding(tmp_path, embed, rest, stated, main):
    """Parameters are neither widened to the embedding's dtype nor rounded to it."""
    config = {**CONFIG, "num_hidden_layers": 1, "torch_dtype": stated}
    tensors = weights(rest, config)
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].astype(DTYPES[embed])
    convert(checkpoint(tmp_path / "hf", config, tensors), tmp_path / "orbax")
    others = {embed, rest} - {main}
    assert store.main_dtypes(tmp_path / "orbax") == (main, *others)
    export(tmp_path / "orbax", tmp_path / "back")
    assert_same_bytes(read_all(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == main


def test_round_trip_of_a_tied_model(tmp_path):
    config = {**CONFIG, "tie_word_embeddings": True}
    tensors = weights(config=config)
    back = there_and_back(tmp_path, checkpoint(tmp_path / "hf", config, tensors))
    assert_same_bytes(read_all(back), tensors)
    assert read_config(back).tie_word_embeddings


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_head_that_is_no_copy_of_the_embedding_is_kept(tmp_path, dtype):
    """The head is kept, as in transformers 5.23, if its numbers differ from the embedding's."""
    config = {**CONFIG, "num_hidden_layers": 1, "tie_word_embeddings": True}
    tensors = tiny.random_tensors(config, seed=1)
    head = tensors["model.embed_tokens.weight"].astype(dtype)
    head[127, 63] += 1
    source = checkpoint(tmp_path / "hf", config, tensors | {"lm_head.weight": head})
    report = convert(source, tmp_path / "orbax")
    assert len(report.notes) == 1 and "both are kept" in report.notes[0]
    assert verify(source, tmp_path / "orbax").notes == report.notes
    export(tmp_path / "orbax", tmp_path / "back")
    assert_same_bytes(read_all(tmp_path / "back"), tensors | {"lm_head.weight": head})
    assert not read_config(tmp_path / "back").tie_word_embeddings


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_head_that_is_a_copy_of_the_embedding_is_left_out(tmp_path, dtype):
    config = {**CONFIG, "num_hidden_layers": 1, "tie_word_embeddings": True}
    tensors = weights("float16", config)
    copy = tensors["model.embed_tokens.weight"].astype(dtype)
    source = checkpoint(tmp_path / "hf", config, tensors | {"lm_head.weight": copy})
    report = convert(source, tmp_path / "orbax")
    assert (report.left_out, report.notes) == (1, ())
    export(tmp_path / "orbax", tmp_path / "back")
    assert_same_bytes(read_all(tmp_path / "back"), tensors)


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


def test_unknown_keys_may_be_ignored(tmp_path):
    source = checkpoint(tmp_path / "hf", {**CONFIG, "alpha": 1, "beta": 2, "gamma": None})
    with pytest.raises(UserError, match=r"'alpha' .*'beta' .*--ignore-unknown-config"):
        convert(source, tmp_path / "orbax")
    convert(source, tmp_path / "orbax", ignore_unknown=True)
    verify(source, tmp_path / "orbax")


def test_an_adapter_is_mentioned(tmp_path):
    source = checkpoint(tmp_path / "hf")
    (source / "adapter_config.json").write_text("{}")
    (note,) = convert(source, tmp_path / "orbax").notes
    assert "adapter_config.json" in note and "not applied" in note
    (source / "config.json").unlink()
    with pytest.raises(UserError, match="holds an adapter and no model"):
        convert(source, tmp_path / "other")


@pytest.mark.parametrize("name", ["x" * 250, "x" * 300, "\0", "\ud800"])
def test_names_that_no_folder_can_have(tmp_path, name):
    source = checkpoint(tmp_path / "hf")
    with pytest.raises(UserError, match="cannot be written: "):
        convert(source, f"{tmp_path}/{name}")


def test_text_only_leaves_vision_out(tmp_path):
    config, tensors = tiny.nested(CONFIG, weights())
    vision = {"vision_model.class_embedding": np.zeros(8, np.float32)}
    source = checkpoint(tmp_path / "hf", config, tensors | vision)
    report = convert(source, tmp_path / "orbax", text_only=True)
    assert (report.tensors, report.left_out) == (len(weights()), 1)
    export(tmp_path / "orbax", tmp_path / "back")
    assert_same_bytes(read_all(tmp_path / "back"), weights())


def test_export_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "SHARD_BYTES", 200_000)
    back = there_and_back(tmp_path, checkpoint(tmp_path / "hf"))
    files = sorted(back.glob("*.safetensors"))
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        held = load_file(file)
        assert {name: file.name for name in held}.items() <= index["weight_map"].items()
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 200_000
    assert index["weight_map"].keys() == weights().keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights().values())
    assert_same_bytes(read_all(back), weights())


def test_tokenizer_files_travel_along(tmp_path):
    source = checkpoint(tmp_path / "hf")
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        (source / name).write_text(name)
    (source / "README.md").write_text("stays")
    back = there_and_back(tmp_path, source)
    for folder in (tmp_path / "orbax", back):
        assert (folder / "tokenizer.json").read_text() == "tokenizer.json"
        assert (folder / "chat_template.jinja").exists()
        assert (folder / "generation_config.json").exists()
        assert not (folder / "README.md").exists()


def test_progress_counts_every_byte(tmp_path, small_blocks):
    seen = []
    report = convert(checkpoint(tmp_path / "hf"), tmp_path / "out", lambda *step: seen.append(step))
    total = sum(tensor.nbytes for tensor in weights().values())
    assert seen[-1] == (total, total) == (report.nbytes, report.nbytes)
    assert len(seen) > len(weights())
    assert seen == sorted(seen)


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


@pytest.mark.parametrize("job", [convert, export])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_existing_output_is_refused_and_kept(tmp_path, job, kind):
    source = checkpoint(tmp_path / "hf")
    if job is export:
        convert(source, tmp_path / "orbax")
        source = tmp_path / "orbax"
    output = tmp_path / "out"
    kept = output / "kept" if kind == "folder" else output
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(UserError, match=rf"{output} exists and is not empty; "):
        job(source, output)
    assert kept.read_text() == "mine"


def read_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_finished_is_not_done_again(tmp_path):
    """Catches a failure that would make a script that retries run forever."""
    source, output = checkpoint(tmp_path / "hf"), tmp_path / "out"
    first = convert(source, output, weights="int8")
    before = read_files(output)
    again = convert(source, output, weights="int8")
    assert again.resumed == again.nbytes == first.nbytes and first.resumed == 0
    assert read_files(output) == before
    with pytest.raises(UserError, match="exists and is not empty"):
        convert(source, output, weights="int4")
    tiny.write_checkpoint(source, CONFIG, tiny.random_tensors(CONFIG, 77))
    with pytest.raises(UserError, match="exists and is not empty"):
        convert(source, output, weights="int8")
    assert read_files(output) == before


def test_empty_output_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    convert(checkpoint(tmp_path / "hf"), tmp_path / "out")
    assert store.read_config(tmp_path / "out") == read_config(tmp_path / "hf")


def test_disk_too_small_is_refused_before_writing(tmp_path, monkeypatch):
    checkpoint(tmp_path / "hf")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("jaxmoe.files.atomic.shutil.disk_usage", lambda _: usage)
    refused(tmp_path, tmp_path, "bytes free, but")


def run_script(script, *arguments, limits=""):
    """Runs a script in a shell with limits."""
    command = [sys.executable, ROOT / "scripts" / script, *arguments]
    shell = ["bash", "-c", f'{limits}\nexec "$@"', "bash", *command]
    return subprocess.run(shell, capture_output=True, text=True, check=False)


def test_full_disk_is_one_sentence(tmp_path):
    """A limit on the size of files makes writes fail as a full disk does."""
    limits = "ulimit -f 8"  # KiB: less than the experts
    source = checkpoint(tmp_path / "hf")
    result = run_script("convert.py", source, tmp_path / "out", limits=limits)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert f"{tmp_path}/out" in result.stderr and "cannot be written" in result.stderr
    assert not (tmp_path / "out").exists()
    result = run_script("convert.py", source, tmp_path / "out")
    assert result.returncode == 0, result.stderr


def test_scripts_there_and_back(tmp_path):
    source = checkpoint(tmp_path / "hf", shards=3)
    converted = run_script("convert.py", source, tmp_path / "orbax")
    exported = run_script("export.py", tmp_path / "orbax", tmp_path / "back")
    for result in (converted, exported):
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.count("\n") == 1
        assert f" {len(weights())} tensors, " in result.stdout and " GB/s)" in result.stdout
    assert_same_bytes(read_all(tmp_path / "back"), weights())


@pytest.mark.parametrize("script", ["convert.py", "export.py"])
def test_script_errors_are_one_line_and_exit_1(tmp_path, script):
    result = run_script(script, tmp_path / "absent", tmp_path / "out")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert str(tmp_path / "absent") in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_written_header_is_aligned(tmp_path):
    back = there_and_back(tmp_path, checkpoint(tmp_path / "hf"))
    length = int.from_bytes((back / "model.safetensors").read_bytes()[:8], "little")
    assert length % 8 == 0
    save_file(load_file(back / "model.safetensors"), tmp_path / "again")  # a valid file to others
