"""Runs that train adapters: of the patterns' matrices alone, whatever the base is stored in."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import convert
from jaxmoe.checkpoint.peft import read_adapter
from jaxmoe.errors import UserError
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.lora import LoraMatrix
from jaxmoe.model.params import named_params
from jaxmoe.train.adapters import adapter_plan
from jaxmoe.train.config import (
    AdapterConfig,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
    read_train_config,
)
from jaxmoe.train.trainer import train
from pallas_kernels.quantized import QuantizedMatrix
from tests import tiny
from tests.conftest import load_tiny, one_device
from tests.tiers import slow_after_first
from tests.train.conftest import EVERY_AXIS, EVERY_AXIS_RTOL

ADAPTER = AdapterConfig(
    rank=4,
    alpha=8.0,
    targets=("layers.*.attention.*", "*.experts.*", "*.router"),
    ranks={"*.experts.*": 2},
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A local and a global layer, in bfloat16."""
    hf = tiny.scout_like(
        num_hidden_layers=2,
        no_rope_layer_interval=2,
        hidden_size=32,
        intermediate_size=32,
        num_local_experts=8,
        num_key_value_heads=8,
        vocab_size=64,
        bos_token_id=0,
        eos_token_id=[1],
        pad_token_id=2,
        torch_dtype="bfloat16",
    )
    tensors = tiny.random_tensors(hf, 3, ml_dtypes.bfloat16)
    return load_tiny(tmp_path_factory.mktemp("lora"), hf, tensors)


def make_config(model, tmp_path):
    np.save(tmp_path / "tokens.npy", np.tile([0, *range(5, 21)], 40))
    tokens = str(tmp_path / "tokens.npy")
    return TrainConfig(
        init=model.checkpoint,
        data=DataConfig(tokens=tokens, length=32, batch_size=8, held_out_every=10),
        optimizer=OptimizerConfig(peak_lr=0.02, warmup_steps=1),
        adapter=ADAPTER,
        output=str(tmp_path / "run"),
        router_loss=0.05,
        router_z_loss=0.01,
        steps=20,
        log_every=1,
        save_every=4,
    )


@pytest.fixture
def config(model, tmp_path):
    return make_config(model, tmp_path)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A run's config and losses."""
    config = make_config(model, tmp_path_factory.mktemp("finished"))
    return config, run(config)


def run(config, mesh=None, stop_after=None, **functions):
    mesh, records = mesh or one_device(), []
    with jax.set_mesh(mesh):
        for record in train(config, mesh, "run.yaml", **functions):
            records.append(record)
            if record["step"] == stop_after:
                break
    return [record["loss"] for record in records]


def adapted(config, mesh=None):
    return store.load(
        config.init, mesh or one_device(), "float32", adapter=f"{config.output}/adapter"
    )


@pytest.mark.slow
def test_a_run_writes_an_adapter_and_resumes_to_the_same(finished, model):
    config, losses = finished
    assert losses[-1] < 0.8 * losses[0]
    assert run(config) == []  # it is finished
    folder = Path(config.output) / "adapter"
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not (folder.parent / "states").exists()
    killed = dataclasses.replace(config, output=config.output + "-killed")
    first = run(killed, stop_after=5)
    assert first + run(killed)[1:] == losses
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (Path(killed.output) / "adapter" / name).read_bytes()
    loaded, params = adapted(config)
    found = {
        n: w for n, (_, w) in named_params(loaded, params).items() if isinstance(w, LoraMatrix)
    }
    assert {n: (w.rank, w.scale) for n, w in found.items()} == {
        f"layers.{i}.{n}": (2, 4.0) if "experts" in n else (4, 2.0)
        for i in (0, 1)
        for n in (
            *(f"attention.{x}" for x in "qkvo"),
            *(f"feed_forward.experts.{x}" for x in ("gate", "up", "down")),
            "feed_forward.router",
        )
    }
    assert all(float(abs(w.b).max()) > 0 for w in found.values())
    for name, (_, w) in named_params(model.config, model.params).items():
        base = found[name].base if name in found else named_params(loaded, params)[name][1]
        np.testing.assert_array_equal(base, np.asarray(w, np.float32))


@pytest.mark.parametrize("mesh", slow_after_first(EVERY_AXIS[:-3:-1]))
def test_the_same_losses_on_any_mesh(finished, mesh):
    config, alone = finished
    config = dataclasses.replace(config, output=f"{config.output}-{mesh}", save_every=0)
    spread = run(config, MeshConfig.parse(mesh).make(), evaluate=lambda params: {})
    np.testing.assert_allclose(spread, alone, rtol=EVERY_AXIS_RTOL)


def few(model, params, batch):
    """A loss that compiles quickly, and reaches one matrix."""
    q = params["layers"][0]["attention"]["q"]
    assert q.a.dtype == q.b.dtype == "bfloat16"
    if isinstance(q.base, QuantizedMatrix):
        assert (q.base.qvalue.dtype, q.base.scale.dtype) == ("int8", "float32")
    value = q.a.astype("float32").sum() + q.b.astype("float32").sum()
    return value, {"loss": value}


def test_what_is_frozen_is_held_as_it_is_stored(config, model, tmp_path):
    """No base is widened: not bfloat16, and not int8."""
    convert(Path(model.checkpoint).parent / "hf", tmp_path / "int8", weights="int8")
    config = dataclasses.replace(config, dtype="bfloat16", steps=1, save_every=0)
    run(config, loss=few, evaluate=lambda params: held(params, "bfloat16", "float32"))
    config = dataclasses.replace(
        config, init=str(tmp_path / "int8"), output=config.output + "-int8"
    )
    run(config, loss=few, evaluate=lambda params: held(params, "int8", "float32"))


def held(params, base, trained):
    """Checks the dtypes of a matrix; the record of an evaluation."""
    q = params["layers"][0]["attention"]["q"]
    assert jax.tree.leaves(q.base)[0].dtype == base and q.a.dtype == q.b.dtype == trained
    return {}


@pytest.mark.slow
def test_qlora_trains_and_full_training_of_its_base_is_refused(config, model, tmp_path):
    convert(Path(model.checkpoint).parent / "hf", tmp_path / "int4", weights="int4")
    config = dataclasses.replace(config, init=str(tmp_path / "int4"), save_every=0)
    losses = run(config)
    assert losses[-1] < 0.8 * losses[0]
    full = dataclasses.replace(config, adapter=None, output=config.output + "-full")
    with pytest.raises(
        UserError, match=r"trains layers\.0\.attention\.k, which `init` has in int4"
    ):
        run(full)
    assert not Path(full.output).exists()
    head = dataclasses.replace(full, steps=1)
    of_head = lambda model, params, batch: (params["lm_head"].sum(), {"loss": 0.0})  # noqa: E731
    run(head, loss=of_head, trainable=lambda name: name == "lm_head")
    kept = store.load(f"{head.output}/checkpoint", one_device())[1]["layers"][0]["attention"]["q"]
    assert kept.format == "int4"


def test_a_run_goes_on_from_an_adapter(finished):
    config, losses = finished
    further = AdapterConfig(init=f"{config.output}/adapter")
    config = dataclasses.replace(config, adapter=further, output=config.output + "-2", steps=1)
    assert run(config)[0] < losses[-1] + 0.05


def test_patterns(config, model):
    def ranks(**fields):
        return adapter_plan(AdapterConfig(**fields), model.config, "run.yaml").ranks

    assert set(ranks()) == {f"layers.{i}.attention.{x}" for i in (0, 1) for x in "qkvo"}
    assert ranks(targets=("*.1.*.q",), ranks={"*.q": 3}) == {"layers.1.attention.q": 3}
    assert set(ranks(targets=("*.shared.up", "*.router"))) == {
        f"layers.{i}.feed_forward.{x}" for i in (0, 1) for x in ("shared.up", "router")
    }
    with pytest.raises(
        UserError, match=r"run.yaml, adapter: 'q_proj' matches no matrix; there are "
    ):
        ranks(targets=("q_proj",))
    with pytest.raises(UserError, match=r"'\*\.mlp' matches no matrix.*layers\.\*\.attention\.q"):
        ranks(ranks={"*.mlp": 3})
    with pytest.raises(UserError, match="lm_head"):
        ranks(targets=("lm_head",))
    with pytest.raises(UserError, match=r"experts\.gate and .*experts\.up are one matrix"):
        ranks(targets=("*.experts.up",))
    assert adapter_plan(
        AdapterConfig(rank=4, alpha=6.0, rslora=True), model.config, "run.yaml"
    ).scales == {f"layers.{i}.attention.{x}": 3.0 for i in (0, 1) for x in "qkvo"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"rank": 0}}, "'rank' the value 0"),
        ({"adapter": {"dropout": 0.1}}, "unknown key 'dropout'"),
        ({"adapter": {"targets": []}}, "'targets' is empty"),
        ({"adapter": {"ranks": {"*": 0.5}}}, r"'ranks' gives '\*' the rank 0.5"),
        ({"init": None, "model": {"a": 1}}, "'adapter' needs 'init'"),
    ],
)
def test_settings_that_are_refused(config, tmp_path, changes, message):
    settings = json.loads(json.dumps(dataclasses.asdict(config))) | changes
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        read_train_config(tmp_path / "run.yaml")


def test_the_settings_of_the_folder(config):
    config = dataclasses.replace(
        config,
        steps=1,
        dtype="bfloat16",
        adapter=AdapterConfig(rank=4, alpha=6.0, rslora=True, layout="peft-0.18"),
    )
    run(config, loss=few)
    settings = json.loads((Path(config.output) / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (4, 6, True)
    assert settings["peft_version"] == "0.18.1"
    assert read_adapter(Path(config.output) / "adapter", store.read_config(config.init)).ranks
