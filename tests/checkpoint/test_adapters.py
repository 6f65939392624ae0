"""Adapters where checkpoints are loaded and exported: beside the matrices, or added to them."""

import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

import jaxmoe
from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import convert
from jaxmoe.checkpoint.export import export
from jaxmoe.checkpoint.formats.safetensors import SafetensorsFolder
from jaxmoe.checkpoint.peft import write_adapter
from jaxmoe.cli import devices, generate
from jaxmoe.errors import UserError
from jaxmoe.eval.logits import token_logits
from jaxmoe.generation.document_identity import model_identity
from jaxmoe.mesh import MeshConfig
from jaxmoe.model import adapters
from jaxmoe.model.lora import is_lora
from tests import formats, tiny
from tests.conftest import one_device

HF = tiny.maverick_like(
    num_hidden_layers=2, no_rope_layer_interval=2, hidden_size=32, num_local_experts=4
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a tower, and an adapter of all of its matrices."""
    folder = tmp_path_factory.mktemp("adapters")
    config, tensors = formats.multimodal(HF, tiny.random_tensors(HF, 3))
    tiny.write_checkpoint(folder / "hf", config, tensors)
    convert(folder / "hf", folder / "checkpoint")
    model, params = store.load(folder / "checkpoint", one_device())
    ranks = dict.fromkeys(adapters.adaptable(model), 2)
    abstract, rng = adapters.abstract_adapters(model, one_device(), ranks), np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda x: jax.device_put(rng.normal(0, 0.1, x.shape).astype(np.float32)), abstract
    )
    new = {name: adapters.Adapter(*pair, 2.0) for name, pair in drawn.items()}
    write_adapter(folder / "adapter", model, adapters.with_adapters(model, params, new))
    return folder


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 110, (4, 20), np.int32)


@pytest.fixture(scope="module")
def logits(folder, tokens):
    config, params = jaxmoe.load(folder / "checkpoint", one_device(), adapter=folder / "adapter")
    return token_logits(config, params, tokens)


def test_a_merged_export_computes_the_same(folder, tokens, logits, tmp_path):
    report = export(folder / "checkpoint", tmp_path / "out", adapter=folder / "adapter")
    assert report.notes == ("Rounding the sums changed them by 0.00% of what the adapter adds.",)
    convert(tmp_path / "out", tmp_path / "merged")
    config, params = store.load(tmp_path / "merged", one_device())
    plain = token_logits(*store.load(folder / "checkpoint", one_device()), tokens)
    assert abs(logits - plain).max() > 0.1
    assert abs(token_logits(config, params, tokens) - logits).max() < 1e-5
    loaded = store.load(folder / "checkpoint", one_device(), adapter=folder / "adapter")
    tower = adapters.merge_adapters(*loaded)["vision"]
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)  # noqa: E731
    jax.tree.map(close, params["vision"], tower)


def test_on_a_mesh_and_without_the_tower(folder, tokens, logits):
    mesh = MeshConfig.parse("fsdp=2,expert=2,tensor=2").make()
    kept = {"text_only": True, "adapter": folder / "adapter"}
    config, params = store.load(folder / "checkpoint", mesh, **kept)
    gate, up = (params["layers"][1]["feed_forward"]["experts"][x] for x in ("gate", "up"))
    assert up.a is None and gate.a.sharding.shard_shape(gate.a.shape) == (2, 16, 2)
    with jax.set_mesh(mesh):
        assert abs(token_logits(config, params, tokens) - logits).max() < 1e-5


def test_adapters_are_cast_to_the_model(folder):
    kept = {"adapter": folder / "adapter"}
    _, params = store.load(folder / "checkpoint", one_device(), "bfloat16", **kept)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}


def test_bfloat16_sums_are_rounded_once_and_the_loss_is_told(folder, tmp_path):
    tiny.write_checkpoint(tmp_path / "hf", *halved(folder))
    convert(tmp_path / "hf", tmp_path / "checkpoint")
    report = export(tmp_path / "checkpoint", tmp_path / "out", adapter=folder / "adapter")
    files = SafetensorsFolder(tmp_path / "out")
    name = "language_model.model.layers.1.feed_forward.experts.gate_up_proj"
    got = files.read(name, 0, 4 * 32 * 128).reshape(4, 32, 128)
    kept = store.load(folder / "checkpoint", one_device(), adapter=folder / "adapter")[1]
    half_precise = store.load(tmp_path / "checkpoint", one_device())[1]
    routed, plain = (p["layers"][1]["feed_forward"]["experts"] for p in (kept, half_precise))
    for i, part in enumerate(("gate", "up")):
        delta = 2.0 * np.asarray(routed["gate"].a) @ np.asarray(routed[part].b)
        exact = np.asarray(plain[part], np.float32) + delta
        half = got[..., 64 * i : 64 * (i + 1)]
        np.testing.assert_array_equal(half, exact.astype(ml_dtypes.bfloat16))
    (note,) = report.notes
    assert 0.001 < float(note.split("by ")[1].partition("%")[0]) / 100 < 0.05


def halved(folder):
    """The files' config and tensors, in bfloat16."""
    config = json.loads((folder / "hf" / "config.json").read_text())
    files = SafetensorsFolder(folder / "hf")
    tensors = {
        name: files.read(name, 0, int(np.prod(entry.shape))).reshape(entry.shape)
        for name, entry in files.tensors.items()
    }
    return config, {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}


def test_a_quantized_base_keeps_its_adapter_beside_it(folder, tokens, logits, tmp_path):
    convert(folder / "hf", tmp_path / "int8", weights="int8")
    config, params = store.load(tmp_path / "int8", one_device(), adapter=folder / "adapter")
    assert any(map(is_lora, jax.tree.leaves(params, is_leaf=is_lora)))
    assert abs(token_logits(config, params, tokens) - logits).max() > 1e-4
    with pytest.raises(UserError, match=r"int8, to which no adapter is added.*--weights bf16"):
        export(tmp_path / "int8", tmp_path / "out", adapter=folder / "adapter")
    export(tmp_path / "int8", tmp_path / "out", adapter=folder / "adapter", weights="float32")
    convert(tmp_path / "out", tmp_path / "wide")
    wide = store.load(tmp_path / "wide", one_device())
    beside = token_logits(config, params, tokens)
    assert abs(token_logits(*wide, tokens) - beside).max() < 1e-5


def test_generate_with_an_adapter(folder, monkeypatch, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "0", "tokens": [1, 2, 3]}) + "\n")
    asked = [folder / "checkpoint", "--prompts", tmp_path / "in.jsonl", "--max-new-tokens", 4]
    asked += ["--temperature", 0, "--rows", 1, "--output", tmp_path / "out.jsonl"]
    monkeypatch.setattr(devices, "start", lambda args: one_device())

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, (*asked, *more))])
        generate.main()

    run("--adapter", folder / "adapter")
    config, params = store.load(folder / "checkpoint", one_device(), adapter=folder / "adapter")
    text = [1, 2, 3, *json.loads((tmp_path / "out.jsonl").read_text())["tokens"]]
    likeliest = token_logits(config, params, np.array([text])).argmax(-1)[0]
    assert likeliest[2:-1].tolist() == text[3:]
    with pytest.raises(UserError, match=r"out\.jsonl"):  # it holds answers of another model
        run()
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        run("--adapter", tmp_path)


def test_documents_are_of_one_adapter(folder):
    plain = store.load(folder / "checkpoint", one_device())
    config, adapted = store.load(folder / "checkpoint", one_device(), adapter=folder / "adapter")
    double = jax.tree.map(lambda w: w, adapted)
    q = double["layers"][0]["attention"]["q"]
    double["layers"][0]["attention"]["q"] = type(q)(q.base, q.a, q.b, 2 * q.scale)
    found = [model_identity(config, params, None) for params in (plain[1], adapted, double)]
    assert len({identity["weights"] for identity in found}) == 3
