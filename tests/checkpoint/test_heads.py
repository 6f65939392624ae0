"""Published draft heads are converted as they are meant, or refused; ours are read by both."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmoe.checkpoint.heads import convert_head, load_head, read_head_config, write_head
from jaxmoe.cli import convert as command
from jaxmoe.errors import UserError
from jaxmoe.mesh import MeshConfig
from tests import tiny
from tests.conftest import one_device
from tests.eagle import head_config, head_tensors, plain_params, target_ids


def write(folder, tensors=None, layer="midlayer", **overrides):
    config = head_config(**overrides)
    found = head_tensors(config, 5, layer) if tensors is None else tensors
    return tiny.write_checkpoint(folder, config, found)


def converted(small, tmp_path, **options):
    source = write(tmp_path / "hf", **options)
    convert_head(source, tmp_path / "head", small.checkpoint)
    return load_head(tmp_path / "head", one_device(), small.config)


@pytest.mark.parametrize("layer", ["midlayer", "layers.0"])
def test_both_spellings_become_the_same_head(small, tmp_path, small_blocks, layer):
    head = converted(small, tmp_path, layer=layer)
    tensors = head_tensors(head_config(), 5)
    wanted = plain_params(head_config(), tensors)
    jax.tree.map(np.testing.assert_array_equal, head.params, wanted)
    assert head.token_ids.tolist() == target_ids(tensors).tolist()
    assert head.config == read_head_config(tmp_path / "head")
    assert head.config.layer_ids == (2, 1, 0)  # of two layers


def test_a_head_on_a_mesh_is_the_same(small, tmp_path):
    one = converted(small, tmp_path)
    mesh = MeshConfig.parse("fsdp=2,tensor=2,data=2").make()
    many = load_head(tmp_path / "head", mesh, small.config, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, one.params, many.params)
    assert many.params["attention"]["q"].sharding.shard_shape((128, 4, 16)) == (64, 2, 16)


def test_embeddings_of_the_target_may_be_there(small, tmp_path):
    tensors = head_tensors(head_config(), 5)
    tensors["embed_tokens.weight"] = small.tensors["model.embed_tokens.weight"].copy()
    converted(small, tmp_path / "same", tensors=tensors)
    tensors["embed_tokens.weight"][100, 3] += 0.5
    with pytest.raises(UserError, match="not the embeddings of"):
        converted(small, tmp_path / "other", tensors=tensors)
    assert not (tmp_path / "other" / "head").exists()


def test_a_whole_vocabulary_needs_no_ids(small, tmp_path):
    tensors = head_tensors(head_config(draft_vocab_size=128), 5)
    del tensors["d2t"], tensors["t2d"]
    head = converted(small, tmp_path, tensors=tensors, draft_vocab_size=128)
    assert head.token_ids.tolist() == list(range(128))


def without(name):
    def change(tensors):
        del tensors[name]

    return change


def put(name, value):
    def change(tensors):
        tensors[name] = value

    return change


REFUSED = [
    (without("d2t"), "lacks the tensor d2t"),
    (without("midlayer.hidden_norm.weight"), "lacks the tensor midlayer.hidden_norm.weight"),
    (put("fc_norm.0.weight", np.ones(64, np.float32)), "holds the tensor fc_norm.0.weight"),
    (put("d2t", np.zeros(3, np.int64)), r"d2t as I64 \[3\]"),
    (put("d2t", np.zeros(48, np.int64) - np.arange(48)), "do not ascend"),
    (put("d2t", np.full(48, 100)), "can guess the token 147"),
    (put("norm.weight", np.ones(32, np.float32)), r"norm.weight with shape \[32\]"),
    (put("norm.weight", np.full(64, np.nan, np.float32)), "with nan at"),
]


@pytest.mark.parametrize("change, message", REFUSED)
def test_bad_heads_are_refused(small, tmp_path, change, message):
    tensors = head_tensors(head_config(), 5)
    change(tensors)
    with pytest.raises(UserError, match=message):
        converted(small, tmp_path, tensors=tensors)
    assert not (tmp_path / "head").exists()


def test_a_head_of_another_target_is_refused(small, scout, tmp_path):
    converted(small, tmp_path)
    other = scout.config.__class__(**{**vars(scout.config), "vocab_size": 120})
    with pytest.raises(UserError, match="its target has 120"):
        load_head(tmp_path / "head", one_device(), other)
    with pytest.raises(UserError, match="no checkpoint of this kind"):
        load_head(small.checkpoint, one_device(), small.config)


def test_a_damaged_head_is_refused(small, tmp_path):
    converted(small, tmp_path)
    (tmp_path / "head" / "state" / "token_ids" / "checksums").write_bytes(b"none")
    with pytest.raises(UserError, match=r"make .* again"):
        load_head(tmp_path / "head", one_device(), small.config)


def test_what_is_written_is_what_was_published(small, tmp_path):
    head = converted(small, tmp_path)
    write_head(tmp_path / "out", head.config, head.params, head.token_ids, 2)
    before, after = (load_file(tmp_path / x / "model.safetensors") for x in ("hf", "out"))
    del before["t2d"]  # follows from d2t
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    convert_head(tmp_path / "out", tmp_path / "again", small.checkpoint)
    assert read_head_config(tmp_path / "again") == head.config


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
    command.main()


def test_the_command_says_how_layer_ids_were_read(small, tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "hf", eagle_aux_hidden_state_layer_ids=[1, 0, 1])
    out = tmp_path / "head"
    run(monkeypatch, source, out, "--target", small.checkpoint)
    captured = capsys.readouterr()
    assert "names the layers 1,0,1, whose outputs it reads: the inputs of 2,1,2." in captured.err
    assert "Converted 15 tensors" in captured.out
    run(monkeypatch, source, tmp_path / "b", "--target", small.checkpoint, "--layer-ids", "0,1,2")
    assert read_head_config(tmp_path / "b").layer_ids == (0, 1, 2)


def test_flags_that_do_not_fit_a_head(small, tmp_path, monkeypatch):
    source = write(tmp_path / "hf")
    with pytest.raises(UserError, match="is a draft head; give --target"):
        run(monkeypatch, source, tmp_path / "out")
    target = ("--target", small.checkpoint)
    with pytest.raises(UserError, match="leave the other flags out"):
        run(monkeypatch, source, tmp_path / "out", *target, "--weights", "int8")
    with pytest.raises(UserError, match="are no 3 numbers"):
        run(monkeypatch, source, tmp_path / "out", *target, "--layer-ids", "2,24")
    (source / "config.json").write_text(json.dumps({"architectures": 3}))
    with pytest.raises(UserError, match="an EAGLE-3 head"):
        run(monkeypatch, source, tmp_path / "out", *target)
