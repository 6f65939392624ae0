"""Each fork beside a dense reference, on one device and on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.forks import lora_attention, prompt_lookup, softmax_router
from jaxmoe.checkpoint import store
from jaxmoe.eval.logits import token_logits
from jaxmoe.mesh import MeshConfig
from jaxmoe.train.config import DataConfig, OptimizerConfig, TrainConfig
from jaxmoe.train.data import training_batch
from jaxmoe.train.loss import next_token_loss
from jaxmoe.train.optimizer import make_optimizer
from jaxmoe.train.partition import split
from jaxmoe.train.state import abstract_state
from jaxmoe.train.trainer import train
from tests import reference, tiny
from tests.conftest import load_tiny, one_device

MESHES = ["data=1", "expert=4,sequence=2"]
LENGTH = 40  # a chunk is 16 tokens


def devices(spec):
    return one_device() if spec == "data=1" else MeshConfig.parse(spec).make()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One local and one global layer; two experts a token."""
    config = tiny.scout_like(
        num_hidden_layers=2, no_rope_layer_interval=2, num_experts_per_tok=2, hidden_size=32
    )
    return load_tiny(tmp_path_factory.mktemp("forks"), config, tiny.random_tensors(config, 3))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 120, (4, LENGTH), np.int32)


def softmax_moe(config, w, x):
    """What Mixtral's paper says, in NumPy: a weighted sum of the chosen experts' outputs."""
    logits = x @ w["feed_forward.router.weight"].T
    chosen = np.argsort(-logits, axis=-1, kind="stable")[..., : config["num_experts_per_tok"]]
    kept = np.full_like(logits, -np.inf)
    np.put_along_axis(kept, chosen, np.take_along_axis(logits, chosen, -1), -1)
    weight = np.exp(kept - kept.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    experts = (
        weight[..., e, None] * reference.routed(w, e, x, 1.0) for e in range(weight.shape[-1])
    )
    return reference.mlp(w, "feed_forward.shared_expert", x) + sum(experts)


@pytest.mark.parametrize("spec", MESHES)
def test_the_softmax_router(model, tokens, spec, monkeypatch):
    plain = reference.logits(model.hf_config, model.tensors, tokens)
    monkeypatch.setattr(reference, "moe", softmax_moe)
    want = reference.logits(model.hf_config, model.tensors, tokens)
    assert abs(want - plain).max() > 0.1
    mesh = devices(spec)
    with jax.set_mesh(mesh):
        params = model.on(mesh)
        path = {"prefill_chunk": 32, "decode_from": LENGTH - 2, "forward": softmax_router.forward}
        got = token_logits(model.config, params, tokens, **path)
    assert abs(got - want).max() < 1e-4


def greedy(model, prompt, count):
    """The greedy answer in float64."""
    text = list(prompt)
    while len(text) < len(prompt) + count:
        text.append(int(reference.logits(model.hf_config, model.tensors, [text])[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("spec", MESHES)
def test_prompt_lookup_is_greedy_in_fewer_steps(model, spec):
    """Across the ends of chunks, with guesses that are right and guesses that are wrong."""
    prompt, count = [5, 7, 9] * 4 + [11, 5, 7], 30
    mesh = devices(spec)
    with jax.set_mesh(mesh):
        steps = list(prompt_lookup.generate(model.config, model.on(mesh), prompt, count))
    assert [token for step in steps for token in step] == greedy(model, prompt, count)
    assert {len(step) for step in steps} >= {1, 2} and len(steps) < count


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    np.save(folder / "tokens.npy", np.tile(np.arange(100), 8))
    return TrainConfig(
        init=model.checkpoint,
        data=DataConfig(tokens=str(folder / "tokens.npy"), length=16, batch_size=4),
        optimizer=OptimizerConfig(peak_lr=0.05, warmup_steps=0, weight_decay=0.0, clip_norm=0.0),
        output=str(folder / "run"),
        steps=3,
        log_every=1,
        save_every=1,
        router_loss=0.0,
    )


def dense_lora(model, run):
    """Losses and delta matrices of attention, by optax alone on whole matrices of rank 8."""
    with jax.set_mesh(one_device()):
        params = lora_attention.with_adapters(model.config, model.params)
    adapters, optimizer = params["adapters"], optax.adam(0.05, b1=0.9, b2=0.95)
    rate = optax.cosine_decay_schedule(1.0, run.steps, run.optimizer.final_lr)

    def loss(adapters, batch):
        layers = []
        for p, one in zip(params["layers"], adapters, strict=True):
            matrices = {}
            for name, w in p["attention"].items():
                a, b = one[name]["a"].reshape(-1, 8), one[name]["b"].reshape(8, -1)
                matrices[name] = w + 2.0 * (a @ b).reshape(w.shape)
            layers.append(p | {"attention": matrices})
        return next_token_loss()(model.config, params | {"layers": layers}, batch)[0]

    state, losses, data = optimizer.init(adapters), [], np.load(run.data.tokens)
    both = jax.jit(jax.value_and_grad(loss))
    for step in range(run.steps):
        batch = training_batch(
            data, model.config.bos_token_id, length=16, rows=4, seed=0, step=step
        )
        value, gradient = both(adapters, batch)
        updates, state = optimizer.update(gradient, state)
        factor = float(rate(step))
        updates = optax.tree.scale(factor, updates)
        adapters = optax.apply_updates(adapters, updates)
        losses.append(float(value))
    return losses, adapters


@pytest.fixture(scope="module")
def dense(model, run):
    return dense_lora(model, run)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["data=1", "fsdp=2,tensor=2,data=2"])
def test_lora_trains_adapters_alone_and_the_result_is_merged(model, run, dense, tokens, spec):
    """A run that is killed in its second step goes on with the adapters of the first."""
    losses, adapters = dense
    mesh = devices(spec)
    run = dataclasses.replace(run, output=f"{run.output}-{mesh.size}")
    with jax.set_mesh(mesh):
        init = lora_attention.with_adapters(model.config, model.on(mesh))
        functions = {"loss": lora_attention.loss, "trainable": lora_attention.trainable}
        functions |= {"init": init, "result": lora_attention.merged}
        killed = train(run, mesh, **functions)
        records = [next(killed)]
        next(killed)
        killed.close()
        records += train(run, mesh, **functions)
        params = store.load(f"{run.output}/checkpoint", mesh)[1]
        got = token_logits(model.config, params, tokens)
    np.testing.assert_allclose([r["loss"] for r in records], losses, rtol=1e-5)
    assert losses[-1] < losses[0]
    tensors = dict(model.tensors)
    for n, layer in enumerate(adapters):
        for name, one in layer.items():
            key = f"model.layers.{n}.self_attn.{name}_proj.weight"
            a, b = one["a"].reshape(-1, 8), one["b"].reshape(8, -1)
            tensors[key] = tensors[key] + 2.0 * np.asarray(a @ b, np.float64).T
    want = reference.logits(model.hf_config, tensors, tokens)
    assert abs(got - want).max() < 1e-3
    unchanged = params["layers"][0]["feed_forward"], params["embed"]
    before = model.params["layers"][0]["feed_forward"], model.params["embed"]
    jax.tree.map(np.testing.assert_array_equal, unchanged, before)


def test_frozen_parameters_have_no_optimizer_state(model, run):
    params = lora_attention.with_adapters(model.config, model.params)
    trained, _ = split(params, lora_attention.trainable)
    state = abstract_state(trained, make_optimizer(run.optimizer, run.steps), one_device())
    numbers = sum(x.size for x in jax.tree.leaves(params["adapters"]))
    assert sum(x.size for x in jax.tree.leaves(state.optimizer) if x.ndim) == 2 * numbers
    assert sum(x.size for x in jax.tree.leaves(state.params)) == numbers
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
