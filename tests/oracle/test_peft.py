"""Adapters go to PEFT and come from it, in the layouts of both of its versions."""

import jax
import numpy as np
import pytest

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import convert
from jaxmoe.checkpoint.peft import read_adapter, write_adapter
from jaxmoe.eval.logits import token_logits
from jaxmoe.model import adapters
from jaxmoe.train.config import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from jaxmoe.train.trainer import train
from tests import formats, tiny
from tests.conftest import one_device
from tests.oracle.conftest import oracle

pytestmark = pytest.mark.oracle

OLDER, NEWER = "0.18.1", "0.21.2"
ATTENTION = [f"self_attn.{x}_proj" for x in "qkvo"]
MLP = ["gate_proj", "up_proj", "down_proj"]  # dense layers and shared experts
GATE_UP, DOWN = "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"
MADE = {  # arguments of LoraConfig
    "attention": {"target_modules": ATTENTION, "r": 4, "lora_alpha": 8},
    "all": {
        "target_modules": [*ATTENTION, *MLP],
        "target_parameters": [DOWN, GATE_UP, "router.weight"],
        "r": 3,
        "lora_alpha": 16,
        "use_rslora": True,
        "rank_pattern": {"self_attn.q_proj": 5, GATE_UP: 2},
        "alpha_pattern": {
            "self_attn.q_proj": 7,
            "router.weight": 3,
            "layers.1.feed_forward.experts.down_proj": 9,
        },
    },
    "gate and up": {"target_modules": [], "target_parameters": [GATE_UP], "r": 2},
    "down": {"target_modules": [], "target_parameters": [DOWN], "r": 2},
}


@pytest.fixture(scope="module", params=[OLDER, NEWER])
def version(request):
    return request.param


@pytest.fixture(scope="module")
def ask(version):
    with oracle(peft=version) if version == OLDER else oracle() as ask:
        yield ask


@pytest.fixture(scope="module", params=["text", "with a tower"])
def model(request, tmp_path_factory):
    """A dense and a MoE layer, of widths that all differ; the files, and what was made of them."""
    folder = tmp_path_factory.mktemp("peft")
    config = tiny.maverick_like(
        num_hidden_layers=2,
        no_rope_layer_interval=2,
        hidden_size=48,
        intermediate_size=32,
        num_local_experts=3,
    )
    tensors = tiny.random_tensors(config, 3)
    if request.param != "text":
        config, tensors = formats.multimodal(config, tensors)
    tiny.write_checkpoint(folder / "hf", config, tensors)
    convert(folder / "hf", folder / "checkpoint")
    tokens = np.random.default_rng(0).integers(0, 110, (2, 20), np.int32)
    np.savez(folder / "in.npz", tokens=tokens)
    return folder, tokens


def their_logits(ask, folder, version, adapter, lora=None):
    request = {"checkpoint": str(folder / "hf"), "tokens": str(folder / "in.npz"), "lora": lora}
    output = folder / "out.npy"
    ask(request | {"adapter": str(adapter), "peft": version, "output": str(output)})
    return np.load(output)


@pytest.mark.parametrize("made", MADE)
def test_adapters_of_peft_mean_the_same_here(ask, version, model, made, tmp_path):
    folder, tokens = model
    theirs = their_logits(ask, folder, version, tmp_path / "adapter", MADE[made])
    mesh = one_device()
    config, params = store.load(folder / "checkpoint", mesh)
    plain = token_logits(config, params, tokens)
    adapter = read_adapter(tmp_path / "adapter", config)
    adapted = adapter.added_to(params, mesh, "float32")
    assert abs(theirs - plain).max() > 1e-2
    assert abs(token_logits(config, adapted, tokens) - theirs).max() < 1e-4


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_written_here_mean_the_same_in_peft(ask, version, model, rslora, tmp_path):
    """Beside every matrix, the tower's included, of two ranks."""
    folder, tokens = model
    mesh = one_device()
    config, params = store.load(folder / "checkpoint", mesh)
    ranks = {name: 2 + 3 * (".q" in name) for name in adapters.adaptable(config)}
    abstract = adapters.abstract_adapters(config, mesh, ranks)
    rng, new = np.random.default_rng(4), {}
    for name, (a, b) in adapters.init_adapters(abstract, jax.random.key(0)).items():
        b = jax.device_put(rng.normal(0, 0.1, b.shape).astype(np.float32), b.sharding)
        rank = ranks[name]
        new[name] = adapters.Adapter(a, b, 8 / rank**0.5 if rslora else 8 / rank)
    adapted = adapters.with_adapters(config, params, new)
    layout = "peft-0.18" if version == OLDER else "peft-0.19"
    write_adapter(tmp_path / "adapter", config, adapted, rslora=rslora, layout=layout)
    theirs = their_logits(ask, folder, version, tmp_path / "adapter")
    ours = token_logits(config, adapted, tokens)
    assert abs(ours - token_logits(config, params, tokens)).max() > 1e-2
    assert abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("model", ["text"], indirect=True)
def test_an_adapter_trained_here_means_the_same_in_peft(ask, version, model, tmp_path):
    """The folder of a finished run, of attention and experts, as PEFT reads it."""
    folder, tokens = model
    documents = [120, *range(5, 36)]  # 120 begins one
    np.save(tmp_path / "tokens.npy", np.tile(documents, 20))
    run = TrainConfig(
        init=str(folder / "checkpoint"),
        data=DataConfig(tokens=str(tmp_path / "tokens.npy"), length=32, batch_size=2),
        optimizer=OptimizerConfig(peak_lr=0.05, warmup_steps=0),
        adapter=AdapterConfig(
            rank=3,
            targets=("layers.*.attention.*", "*.experts.*"),
            ranks={"*.experts.*": 2},
            layout="peft-0.18" if version == OLDER else "peft-0.19",
        ),
        output=str(tmp_path / "run"),
        steps=3,
        log_every=1,
    )
    mesh = one_device()
    with jax.set_mesh(mesh):
        losses = [record["loss"] for record in train(run, mesh)]
    assert losses[-1] < losses[0]
    theirs = their_logits(ask, folder, version, tmp_path / "run" / "adapter")
    config, params = store.load(folder / "checkpoint", mesh)
    plain = token_logits(config, params, tokens)
    config, adapted = store.load(
        folder / "checkpoint", mesh, "float32", adapter=tmp_path / "run" / "adapter"
    )
    assert abs(theirs - plain).max() > 1e-2
    assert abs(token_logits(config, adapted, tokens) - theirs).max() < 1e-4
