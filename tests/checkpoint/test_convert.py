"""Converting and exporting keeps every byte, and nothing unfinished looks finished."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmoe.checkpoint import export as export_module
from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import convert, verify
from jaxmoe.checkpoint.export import export
from jaxmoe.errors import UserError
from jaxmoe.hf_config import read_config
from tests import scripts, tiny
from tests.checkpoint.sources import (
    CONFIG,
    FLOATS,
    ROOT,
    assert_same_bytes,
    checkpoint,
    read_all,
    there_and_back,
    weights,
)


@pytest.mark.parametrize("dtype", FLOATS)
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
    tensors["lm_head.weight"] = pattern.view(FLOATS["bfloat16"]).reshape(128, 64)
    tensors["model.norm.weight"] = np.zeros(64, FLOATS["bfloat16"])  # the arrays' fill value
    back = there_and_back(tmp_path, checkpoint(tmp_path / "hf", CONFIG, tensors))
    assert_same_bytes(read_all(back), tensors)


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
    tensors[name] = tensors[name].astype(FLOATS[embed])
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


def test_full_disk_is_one_sentence(tmp_path):
    """A limit on the size of files makes writes fail as a full disk does."""
    limits = "ulimit -f 8"  # KiB: less than the experts
    source = checkpoint(tmp_path / "hf")
    command = [sys.executable, ROOT / "scripts" / "convert.py", source, tmp_path / "out"]
    shell = ["bash", "-c", f'{limits}\nexec "$@"', "bash", *command]
    result = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert f"{tmp_path}/out" in result.stderr and "cannot be written" in result.stderr
    assert not (tmp_path / "out").exists()
    result = scripts.run("convert.py", source, tmp_path / "out")
    assert result.returncode == 0, result.stderr


def test_scripts_there_and_back(tmp_path):
    source = checkpoint(tmp_path / "hf", shards=3)
    converted = scripts.run("convert.py", source, tmp_path / "orbax")
    exported = scripts.run("export.py", tmp_path / "orbax", tmp_path / "back")
    for result in (converted, exported):
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.count("\n") == 1
        assert f" {len(weights())} tensors, " in result.stdout and " GB/s)" in result.stdout
    assert_same_bytes(read_all(tmp_path / "back"), weights())


@pytest.mark.parametrize("script", ["convert.py", "export.py"])
def test_script_errors_are_one_line_and_exit_1(tmp_path, script):
    result = scripts.run(script, tmp_path / "absent", tmp_path / "out")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert str(tmp_path / "absent") in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_written_header_is_aligned(tmp_path):
    back = there_and_back(tmp_path, checkpoint(tmp_path / "hf"))
    length = int.from_bytes((back / "model.safetensors").read_bytes()[:8], "little")
    assert length % 8 == 0
    save_file(load_file(back / "model.safetensors"), tmp_path / "again")  # a valid file to others
