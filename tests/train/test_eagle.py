"""Heads are trained on what NumPy says they are trained on, and written as others read them."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmoe.checkpoint.heads import convert_head, load_head
from jaxmoe.eagle_config import eagle_from_hf
from jaxmoe.errors import UserError
from jaxmoe.fields import read_fields
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.eagle import abstract_eagle
from jaxmoe.train.config import HeadConfig, TrainConfig, read_train_config
from jaxmoe.train.data import Batch
from jaxmoe.train.eagle import HEAD, TOKEN_IDS, head_loss, most_common_tokens
from jaxmoe.train.trainer import train
from tests import reference
from tests.conftest import one_device
from tests.eagle import Head, head_config, head_tensors, plain_params, target_ids

PASSES, DECAY = 3, 0.8
MESH = "data=2,fsdp=2,tensor=2"


def batch():
    """Two rows of two texts and padding, of which some tokens are not learned."""
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, 128, (2, 14), np.int32)
    segments = np.repeat([[1, 2, 0], [3, 3, 4]], [6, 6, 2], axis=1).astype(np.int32)
    return Batch(tokens, segments, rng.random((2, 14)) < 0.8)


def head():
    """A head that cannot guess all of the target's likeliest tokens."""
    mapping = head_config(draft_vocab_size=96)
    return mapping, head_tensors(mapping, 6)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def numpy_loss(model, mapping, tensors, rows, layer_ids):
    """Each chain by itself, one token at a time: the losses by pass, what is right, the targets."""
    tokens, segments, learned, _ = rows
    wide = {name: x.astype(np.float64) for name, x in model.tensors.items()}
    logits = reference.logits(model.hf_config, model.tensors, tokens, segments)
    streams = list(reference.streams(model.hf_config, wide, tokens, segments))
    states = np.concatenate([streams[i] for i in layer_ids], axis=-1)
    ids, nats, right, targets = target_ids(tensors), np.zeros(PASSES), np.zeros(PASSES), 0
    for row in range(len(tokens)):
        for t, segment in enumerate(segments[row]):
            place = np.flatnonzero(segments[row] == segment)
            ahead = place[place > t]
            if segment == 0 or not len(ahead):
                continue
            first, count = place[0], min(PASSES, len(ahead))
            read = Head(mapping, tensors, wide["model.embed_tokens.weight"])
            _, drafted = read.draft(
                tokens[row, first + 1 : t + 2],
                states[row, first : t + 1],
                count,
                forced=tokens[row, t + 2 :],
            )
            for n in range(count):
                at = t + 1 + n
                is_target = at + 1 in ahead and learned[row, at + 1]
                if not is_target or logits[row, at].argmax() not in ids:
                    continue
                wanted = log_softmax(logits[row, at][ids])
                nats[n] -= np.exp(wanted) @ log_softmax(drafted[n])
                right[n] += drafted[n].argmax() == wanted.argmax()
                targets += n == 0
    return nats / targets, right / targets, targets


def placed(model, tensors, mapping, mesh):
    """The target's and the head's parameters on a mesh."""
    config, _ = eagle_from_hf(mapping, "head", model.config)
    params = jax.tree.map(jnp.asarray, plain_params(mapping, tensors))
    shapes = abstract_eagle(config, mesh, jnp.float32)
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, shapes)
    ids = jnp.asarray(target_ids(tensors), jnp.int32)
    return config, model.on(mesh) | {HEAD: params, TOKEN_IDS: ids}


@pytest.fixture(scope="module")
def found(small):
    """The loss and its gradient on one device."""
    mapping, tensors = head()
    return judged(small, mapping, tensors, one_device())


def judged(model, mapping, tensors, mesh):
    config, params = placed(model, tensors, mapping, mesh)
    loss = head_loss(config, PASSES, DECAY)

    @jax.jit
    def run(trained, others, rows):
        return jax.value_and_grad(
            lambda trained: loss(model.config, {**others, HEAD: trained}, rows), has_aux=True
        )(trained)

    others = {name: x for name, x in params.items() if name != HEAD}
    with jax.set_mesh(mesh):
        (total, metrics), gradient = run(params[HEAD], others, batch())
    return float(total), jax.device_get(metrics), jax.device_get(gradient)


def test_the_loss_is_that_of_chains_one_by_one(small, found):
    """Wrong places, segments, masks, vocabularies, keys or weights would differ."""
    mapping, tensors = head()
    nats, right, targets = numpy_loss(small, mapping, tensors, batch(), (2, 1, 0))
    total, metrics, _ = found
    assert 0 < targets < np.sum(batch().segment_ids != 0) - 4 and right.any()
    assert metrics["targets"] == targets
    np.testing.assert_allclose(metrics["pass_loss"], nats, rtol=1e-4)
    np.testing.assert_allclose(metrics["right"], right, rtol=1e-5)
    assert total == pytest.approx(sum(nats * DECAY ** np.arange(PASSES)), rel=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "fc.weight",
        "midlayer.self_attn.k_proj.weight",
        "midlayer.self_attn.v_proj.weight",
        "midlayer.mlp.down_proj.weight",
        "midlayer.hidden_norm.weight",
        "lm_head.weight",
    ],
)
def test_the_gradient_is_that_of_finite_differences(small, found, name):
    """Along a random direction of each tensor, in NumPy's float64."""
    mapping, tensors = head()
    along = np.random.default_rng(1).normal(size=tensors[name].shape) * 1e-4

    def total(sign):
        moved = {**tensors, name: tensors[name].astype(np.float64) + sign * along}
        return numpy_loss(small, mapping, moved, batch(), (2, 1, 0))[0] @ (
            DECAY ** np.arange(PASSES)
        )

    wanted = (total(1) - total(-1)) / 2
    zeros = {key: np.zeros_like(x) if key != name else along for key, x in tensors.items()}
    direction = plain_params(mapping, zeros)
    products = jax.tree.map(lambda d, g: np.sum(d * g), direction, found[2])
    assert sum(jax.tree.leaves(products)) == pytest.approx(wanted, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,tensor=2,sequence=2", "fsdp=2,expert=2,tensor=2"])
def test_the_same_on_a_mesh(small, found, mesh):
    mapping, tensors = head()
    total, metrics, gradient = judged(small, mapping, tensors, MeshConfig.parse(mesh).make())
    assert total == pytest.approx(found[0], rel=1e-5)
    np.testing.assert_allclose(metrics["pass_loss"], found[1]["pass_loss"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()),
        gradient,
        found[2],
    )


def test_the_draft_vocabulary_is_what_is_learned_most():
    """Not what is only read, nor padding."""
    tokens = np.array([[7, 7, 7, 3, 3, 5, 9, 9, 9, 9]])
    learned = np.ones_like(tokens, bool)
    learned[0, :2] = False
    segments = np.array([[1, 1, 1, 1, 1, 1, 0, 0, 0, 0]])

    def batches(number):
        return Batch(tokens, segments, learned if number else None)

    assert most_common_tokens(batches, 1, 12, 2).tolist() == [3, 7]
    assert most_common_tokens(lambda n: batches(1), 2, 12, 3).tolist() == [3, 5, 7]
    assert most_common_tokens(lambda n: batches(1), 1, 12, 4).tolist() == [0, 3, 5, 7]
    assert most_common_tokens(batches, 1, 12, 99).tolist() == list(range(12))


def test_the_example_of_the_page_is_read(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "drafts.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "run.yaml").write_text(block)
    config = read_train_config(tmp_path / "run.yaml")
    assert config.result == "head" and config.head == HeadConfig(intermediate_size=32768)


def run_config(small, folder, **changes):
    rng = np.random.default_rng(2)
    tokens = rng.choice([3, 17, 44, 90, 101], 2000).astype(np.uint16)
    tokens[::40] = 120  # begins a document
    np.save(folder / "tokens.npy", tokens)
    content = {
        "init": small.checkpoint,
        "head": {"draft_vocab_size": 96, "passes": 2, "intermediate_size": 32},
        "output": str(folder / "run"),
        "data": {
            "tokens": str(folder / "tokens.npy"),
            "length": 20,
            "batch_size": 4,
            "held_out_every": 10,
        },
        "optimizer": {"peak_lr": 0.01, "warmup_steps": 0, "weight_decay": 0.0},
        "steps": 6,
        "log_every": 1,
        **changes,
    }
    return read_fields(TrainConfig, content, "run.yaml")


@pytest.mark.slow
def test_a_run_trains_a_head_that_can_be_converted(small, tmp_path):
    """And the held-out loss falls."""
    mesh = one_device()
    config = run_config(small, tmp_path, save_every=3, evaluate_every=3)
    with jax.set_mesh(mesh):
        records = list(train(config, mesh))
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["held_out_loss"] < records[2]["held_out_loss"]
    assert len(records[0]["right"]) == len(records[0]["pass_loss"]) == 2
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "head", "config.json", "losses.png", "metrics.jsonl"
    }  # fmt: skip
    convert_head(tmp_path / "run" / "head", tmp_path / "head", small.checkpoint)
    head = load_head(tmp_path / "head", mesh, small.config)
    assert head.config.intermediate_size == 32
    assert {3, 17, 44, 90, 101, 120} < set(head.token_ids.tolist())
    again = dataclasses.replace(
        config,
        output=str(tmp_path / "more"),
        head=dataclasses.replace(config.head, init=str(tmp_path / "head")),
        steps=1,
    )
    with jax.set_mesh(mesh):
        (record,) = train(again, mesh)
    assert record["loss"] < records[0]["loss"]  # of the same batch


@pytest.mark.slow
def test_a_run_that_ended_early_goes_on_alike(small, tmp_path):
    mesh = one_device()
    results = []
    for name, stops in (("whole", False), ("parts", True)):
        folder = tmp_path / name
        folder.mkdir()
        config = run_config(small, folder, save_every=2, steps=4)
        with jax.set_mesh(mesh):
            if stops:
                run = train(config, mesh, stop=iter([False, True]).__next__)
                with pytest.raises(Exception, match="run again"):
                    list(run)
            list(train(config, mesh))
        results.append(load_file(folder / "run" / "head" / "model.safetensors"))
    for name, tensor in results[0].items():
        np.testing.assert_array_equal(results[1][name], tensor)


@pytest.mark.slow
def test_batches_that_make_one_step_are_as_one(small, tmp_path):
    """Whether the batches have as many targets or not."""
    mesh, found = one_device(), []
    rows = batch()
    for name, parts in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        config = run_config(small, tmp_path / name, steps=1, accumulate=parts, data=None)

        def batches(n, parts=parts):
            return Batch(*(None if x is None else x[n % 2 :: parts] for x in rows))

        whole = {"draft_vocab_size": 128, "passes": 3}
        config = dataclasses.replace(config, head=dataclasses.replace(config.head, **whole))
        with jax.set_mesh(mesh):
            found += list(train(config, mesh, batches=batches))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert found[0]["gradient_norm"] == pytest.approx(found[1]["gradient_norm"], rel=1e-4)
    np.testing.assert_allclose(found[0]["pass_loss"], found[1]["pass_loss"], atol=2e-4)


@pytest.mark.slow
def test_a_run_on_a_mesh_takes_the_same_steps(small, tmp_path):
    """From the same random head and draft vocabulary, which are made where they lie."""
    found = []
    for name, mesh in (("one", one_device()), ("mesh", MeshConfig.parse(MESH).make())):
        (tmp_path / name).mkdir()
        with jax.set_mesh(mesh):
            found.append(list(train(run_config(small, tmp_path / name, steps=2), mesh)))
    for one, other in zip(*found, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert found[1][1]["held_out_loss"] == pytest.approx(found[0][1]["held_out_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init": None, "model": {"model_type": "llama4_text"}}, "'head' needs 'init'"),
        ({"adapter": {}}, "leave 'adapter' out"),
        ({"frozen": ["norm"]}, "leave 'frozen' out"),
        ({"head": {"passes": 0}}, "'passes' the value 0"),
        ({"head": {"layer_ids": [1, 2, 3]}}, "has 3 ids from 0 to 2"),
        ({"head": {"layer_ids": [1, 1, 2]}}, "let the first be 2"),
        (
            {"head": {"init": "nowhere"}},
            "make one with jaxmoe convert HEAD",
        ),
    ],
)
def test_runs_of_heads_that_cannot_be(small, tmp_path, changes, message):
    mesh = one_device()
    with pytest.raises(UserError, match=message):
        config = run_config(small, tmp_path, **changes)
        with jax.set_mesh(mesh):
            next(train(config, mesh))
    assert not (tmp_path / "run").exists()


def test_a_head_keeps_its_place_on_a_mesh(small):
    mesh = MeshConfig.parse("fsdp=2,tensor=4").make()
    mapping, tensors = head()
    with pytest.raises(UserError, match="does not divide the 2 of 'kv_heads' in head"):
        placed(small, tensors, mapping, mesh)
