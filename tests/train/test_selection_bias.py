"""Experts are balanced by biases without a loss (Wang et al., arXiv 2408.15664)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.export import export
from jaxmoe.errors import UserError
from jaxmoe.hf_config import from_hf
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.moe import choose_experts
from jaxmoe.model.transformer import forward, positions_of
from jaxmoe.train import data
from jaxmoe.train.config import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from jaxmoe.train.loss import next_token_loss
from jaxmoe.train.optimizer import make_optimizer
from jaxmoe.train.partition import everything, split
from jaxmoe.train.selection_bias import NAME, model_of, moved, with_biases
from jaxmoe.train.state import SavedStates, abstract_state, random_params, state_of
from jaxmoe.train.step import make_step
from jaxmoe.train.trainer import set_up, train
from tests import tiny
from tests.conftest import one_device

MODEL = tiny.scout_like(
    num_hidden_layers=2,
    moe_layers=[1],
    hidden_size=16,
    intermediate_size=16,
    intermediate_size_mlp=16,
    num_experts_per_tok=2,
    vocab_size=64,
    bos_token_id=0,
    eos_token_id=[1],
    pad_token_id=2,
)
RATE = 0.02


@pytest.fixture
def config(tmp_path):
    np.save(tmp_path / "tokens.npy", np.tile([0, *range(5, 21)], 40))
    return TrainConfig(
        model=MODEL,
        data=DataConfig(tokens=str(tmp_path / "tokens.npy"), length=16, batch_size=4),
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=0),
        output=str(tmp_path / "run"),
        steps=4,
        frozen=("*.router",),
        router_loss=0.0,
        selection_bias=RATE,
        accumulate=2,
        remat="full",
        log_every=1,
        save_every=2,
    )


@pytest.mark.parametrize("k", [1, 2])
def test_the_bias_chooses_and_weighs_nothing(k):
    config = dataclasses.replace(from_hf(MODEL, "test"), num_experts_per_tok=k)
    rng = np.random.default_rng(k)
    logits, bias = rng.normal(size=(2, 9, 8)).astype(np.float32), rng.normal(size=8) / 2
    real = np.arange(18).reshape(2, 9) % 7 > 0
    scores = 1 / (1 + np.exp(-logits))
    wanted = np.argsort(-(scores + bias), axis=-1)[..., :k]
    assert (wanted != np.argsort(-scores, axis=-1)[..., :k]).any()
    bias = jnp.asarray(bias, jnp.float32)
    routing = choose_experts(config, jnp.asarray(logits), jnp.asarray(real), bias)
    np.testing.assert_array_equal(routing.expert, np.where(real[..., None], wanted, 8))
    weight = np.take_along_axis(scores, wanted, -1)
    np.testing.assert_allclose(routing.router_weight, weight, rtol=1e-6)

    def total(logits, bias):
        return choose_experts(config, logits, jnp.asarray(real), bias).router_weight.sum()

    of_logits, of_bias = jax.grad(total, (0, 1))(jnp.asarray(logits), bias)
    chosen = (np.arange(8) == wanted[..., None]).any(-2)
    np.testing.assert_allclose(of_logits, chosen * scores * (1 - scores), rtol=1e-5)
    assert not of_bias.any()


def biases(params):
    parts = (layer["feed_forward"] for layer in params["layers"])
    return np.array([part[NAME] for part in parts if NAME in part])


def two_batches():
    """Rows that have fewer and fewer tokens, so that the second batch has less than the first."""
    tokens = np.random.default_rng(0).integers(3, 64, (2, 4, 64)).astype(np.int32)
    ids = (np.arange(64) < 64 - 6 * np.arange(8)[:, None]).astype(np.int32)
    return data.Batch(tokens, ids.reshape(tokens.shape))


def skewed(params):
    """The first expert's logits are five times as large, so that it gets most tokens."""
    part = params["layers"][1]["feed_forward"]
    part["router"] = part["router"].at[:, 0].multiply(5)
    return params


def steps(config, mesh, count, look=lambda *arguments: None):
    """The biases after each step, and the losses; the last state."""
    plain, batch, found = from_hf(MODEL, "test"), two_batches(), []
    model = model_of(config, plain)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, config.steps)
        params = skewed(random_params(plain, mesh, config.seed))
        params = with_biases(model, params, mesh)
        abstract = abstract_state(params, optimizer, mesh)
        state = state_of(params, optimizer, mesh)
        frozen = split(params, everything)[1]
        step = make_step(config, model, optimizer, next_token_loss(remat=config.remat), abstract)
        for _ in range(count):
            look(model, state.params, batch)
            state, outcome = step(frozen, state, batch)
            assert "router_assignments" not in outcome.metrics
            found.append((biases(state.params), float(outcome.metrics["loss"])))
    return *map(np.array, zip(*found, strict=True)), state


@functools.partial(jax.jit, static_argnums=0)
def assignments(model, params, tokens, ids):
    stats = forward(model, params, tokens, positions_of(ids), ids).router_stats
    return [layer.assignments for layer in stats]


class Reference:
    """The update in NumPy, which keeps its own biases and counts what is chosen by them."""

    def __init__(self):
        self.bias = np.zeros((1, 8), np.float32)
        self.kept, self.peaks = [], []

    def look(self, model, params, batch):
        np.testing.assert_array_equal(biases(params), self.bias)
        rows, ids = (jnp.asarray(x.reshape(8, 64)) for x in batch[:2])
        counts = np.array(assignments(model, params, rows, ids), np.float64)
        violation = counts.mean(axis=1, keepdims=True) - counts
        self.bias = self.bias + np.float32(RATE) * np.sign(violation, dtype=np.float32)
        self.kept.append(self.bias)
        self.peaks.append(counts.max() / counts.mean())


@pytest.mark.slow
def test_loads_even_out_without_a_term_in_the_loss(config):
    """As NumPy says, over all batches of a step; the first loss is that without biases."""
    still = dataclasses.replace(config, optimizer=OptimizerConfig(peak_lr=1e-12))
    reference = Reference()
    found, losses, state = steps(still, one_device(), 30, reference.look)
    np.testing.assert_array_equal(found, reference.kept)
    assert np.mean(reference.peaks[-5:]) < 0.75 * reference.peaks[0], reference.peaks
    moments = jax.tree.leaves_with_path(state.optimizer)
    own = [x for path, x in moments if NAME in jax.tree_util.keystr(path)]
    assert len(own) == 2 and not np.any(own)
    without = dataclasses.replace(still, selection_bias=0.0)
    none, as_before, state = steps(without, one_device(), 1)
    assert not none.size and NAME not in state.params["layers"][1]["feed_forward"]
    np.testing.assert_array_equal(as_before, losses[:1])


def test_each_layer_is_moved_by_its_own_load():
    """Dense layers have none; a frozen bias, None, stays, and its load is passed over."""
    parts = [{NAME: jnp.zeros(2)}, {"gate": 1}, {NAME: None}, {NAME: jnp.ones(2)}]
    trained = {"layers": [{"feed_forward": part} for part in parts], "norm": 3}
    after = moved(trained, jnp.array([[3, 1], [5, 0], [0, 8]]), 0.5)
    first, dense, frozen, last = (layer["feed_forward"] for layer in after["layers"])
    assert (first[NAME].tolist(), last[NAME].tolist()) == ([-0.5, 0.5], [1.5, 0.5])
    assert (dense, frozen, after["norm"]) == ({"gate": 1}, {NAME: None}, 3)
    even = moved({"layers": [{"feed_forward": parts[0]}]}, jnp.array([[2, 2]]), 0.5)
    assert not even["layers"][0]["feed_forward"][NAME].any()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_no_optimizer_moves_a_bias_by_itself(name):
    optimizer = make_optimizer(OptimizerConfig(name=name, peak_lr=0.1, warmup_steps=0), 9)
    params = {"feed_forward": {NAME: jnp.arange(4.0), "router": jnp.ones((4, 4))}}
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    assert not updates["feed_forward"][NAME].any()


def run(config, mesh, stop_after=None):
    with jax.set_mesh(mesh):
        for record in train(config, mesh, "test"):
            assert "router_assignments" not in record
            if record["step"] == stop_after:
                break
    return store.load(f"{config.output}/checkpoint", one_device()) if stop_after is None else None


@pytest.mark.slow
def test_a_run_is_resumed_with_its_biases_and_export_does_not_lose_them_silently(config, tmp_path):
    """Also on another mesh, and beside frozen routers."""
    config = dataclasses.replace(config, remat="none", accumulate=1)  # quicker to compile
    model, params = run(config, one_device())
    assert model.selection_bias and np.abs(biases(params)).max() > 0
    start = random_params(from_hf(MODEL, "test"), one_device(), config.seed)
    routers = (p["layers"][1]["feed_forward"]["router"] for p in (start, params))
    np.testing.assert_array_equal(*routers)
    killed = dataclasses.replace(config, output=f"{tmp_path}/killed")
    run(killed, one_device(), stop_after=3)
    spread = run(killed, MeshConfig.parse("fsdp=2,expert=2,tensor=2").make())[1]
    np.testing.assert_array_equal(biases(spread), biases(params))

    checkpoint = f"{config.output}/checkpoint"
    with pytest.raises(UserError, match=r"selection bias, for which .*--drop-selection-bias"):
        export(checkpoint, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    report = export(checkpoint, tmp_path / "exported", drop_selection_bias=True)
    assert "chooses other experts" in report.notes[0]
    assert "selection_bias" not in (tmp_path / "exported/config.json").read_text()

    tuned = dataclasses.replace(config, model={}, init=checkpoint, output=f"{tmp_path}/tuned")
    for rate in (0.0, RATE):  # which stay where they are without it
        next_run = dataclasses.replace(tuned, selection_bias=rate)
        setup = set_up(next_run, model, one_device(), "test")
        with jax.set_mesh(one_device()), SavedStates.open(tmp_path / "no-states") as states:
            state, _ = setup.begin(states)
        np.testing.assert_array_equal(biases(state.params), biases(params))


def test_what_moves_no_bias_is_refused(config):
    with pytest.raises(UserError, match="files of an adapter have no place"):
        dataclasses.replace(config, model={}, init="x", adapter=AdapterConfig())
    frozen = dataclasses.replace(config, frozen=("*.selection_bias",))
    with pytest.raises(UserError, match="'selection_bias' moves nothing"):
        run(frozen, one_device())
    optimizer = make_optimizer(config.optimizer, 9)
    weights = jax.device_put(jnp.ones(3), NamedSharding(one_device(), PartitionSpec()))
    state = state_of({"w": weights}, optimizer, one_device())
    plain = dataclasses.replace(config, accumulate=1)
    step = make_step(plain, from_hf(MODEL, "test"), optimizer, lambda m, p, b: (p["w"].sum(), {}))
    with pytest.raises(UserError, match="needs a loss whose metrics have 'router_assignments'"):
        step({"w": None}, state, jnp.ones(1))
