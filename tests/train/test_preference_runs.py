"""Runs on pairs of answers: their reference, their first loss, meshes, resuming and bad rows."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.embedding import unembed
from jaxmoe.model.transformer import forward
from jaxmoe.train.batches import training_data
from jaxmoe.train.config import (
    AdapterConfig,
    DataConfig,
    OptimizerConfig,
    PreferenceConfig,
    SourceConfig,
    TrainConfig,
)
from jaxmoe.train.conversations import pair_of
from jaxmoe.train.preferences import preference_loss
from jaxmoe.train.trainer import train
from tests import tiny
from tests.conftest import load_tiny, one_device
from tests.train.test_data_runs import MODEL, TOKENIZER, write

LN_2 = float(np.float32(np.log(2)))
LENGTH = 64


def pair(question, chosen, rejected):
    def says(text):
        return [{"role": "assistant", "content": text}]

    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt, "chosen": says(chosen), "rejected": says(rejected)}


ROWS = [pair(f"{i}?", "a" * (1 + i % 4), "b" * (1 + i % 3)) for i in range(20)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    return load_tiny(folder, MODEL, tiny.random_tensors(MODEL, 4))


@pytest.fixture
def config(model, tmp_path):
    TOKENIZER.save(tmp_path)
    return TrainConfig(
        init=model.checkpoint,
        tokenizer=str(tmp_path),
        data=DataConfig(
            files=(write(tmp_path / "pairs.jsonl", ROWS),),
            length=LENGTH,
            batch_size=4,
            held_out_every=10,
        ),
        preference=PreferenceConfig(),
        optimizer=OptimizerConfig(peak_lr=0.01, warmup_steps=1),
        output=str(tmp_path / "run"),
        steps=6,
        log_every=1,
        save_every=2,
    )


def run(config, mesh=None, stop_after=None):
    mesh = mesh or one_device()
    with jax.set_mesh(mesh):
        records = train(config, mesh)
        return [r for r, _ in zip(records, range(stop_after or config.steps), strict=False)]


def losses(records):
    return [r["loss"] for r in records]


def test_adapters_begin_at_ln_2_and_their_reference_is_the_base(config, tmp_path):
    halves = {"first": ROWS[:10], "last": ROWS[10:]}
    files = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in halves.items()}
    sources = tuple(SourceConfig(path=path, weight=1.0, name=name) for name, path in files.items())
    data = dataclasses.replace(config.data, files=(), sources=sources)
    config = dataclasses.replace(config, adapter=AdapterConfig(rank=4), data=data)
    records = run(config)
    for record in records:
        of_sources = [record[f"targets/{x}"] * record.get(f"loss/{x}", 0) for x in halves]
        assert sum(of_sources) == pytest.approx(record["targets"] * record["loss"], rel=1e-5)
    held_out = [records[-1][f"held_out_loss/{name}"] for name in halves]  # a pair each
    assert sum(held_out) / 2 == pytest.approx(records[-1]["held_out_loss"], rel=1e-5)
    assert records[0]["loss"] == LN_2
    assert records[0]["rewards/margins"] == 0
    assert records[-1]["loss"] < 0.6
    assert records[-1]["rewards/accuracies"] == 1
    assert records[-1]["held_out_loss"] < 0.6
    assert records[-1]["held_out_rewards/accuracies"] == 1
    assert not (tmp_path / "run" / "reference.npz").exists()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sigmoid", "ipo"])
def test_adapters_of_experts_are_rounded_as_their_reference_is(config, objective):
    """In bfloat16 too: adapters that add nothing leave no margin."""
    config = dataclasses.replace(
        config,
        adapter=AdapterConfig(rank=4, targets=("*.experts.*", "layers.*.attention.q")),
        preference=PreferenceConfig(objective=objective, beta=0.5),
        dtype="bfloat16",
        steps=1,
        save_every=0,
    )
    (record,) = run(config)
    assert record["loss"] == (LN_2 if objective == "sigmoid" else 1.0)  # (1 / (2 beta))^2
    assert record["rewards/margins"] == 0
    assert record["router_peak"] >= 1 and record["balance_loss"] > 0


@pytest.mark.slow
def test_batches_of_a_step_are_one_batch(config):
    parts = dataclasses.replace(config.data, batch_size=2)
    accumulated = dataclasses.replace(
        config, data=parts, accumulate=2, output=config.output + "-parts"
    )
    losses_of = [
        losses(run(dataclasses.replace(c, router_loss=0.0))) for c in (config, accumulated)
    ]
    np.testing.assert_allclose(*losses_of, rtol=1e-5)


def test_a_loss_of_a_fork_has_the_reference_of_the_run(config):
    changed = dataclasses.replace(config, output=config.output + "-fork", router_loss=0.0)
    loss = preference_loss(config.preference, forward=forward)
    mesh = one_device()
    with jax.set_mesh(mesh):
        found = list(train(changed, mesh, loss=loss))
    assert found[-1]["loss"] < 0.5


def test_pairs_without_a_reference_are_refused(config, model):
    loss = preference_loss(config.preference)
    batch = next(training_data(config, model.config).held_out())
    with pytest.raises(UserError, match="pairs need a reference"):
        loss(model.config, model.params, batch)


@pytest.mark.slow
def test_a_whole_model_keeps_its_first_log_probabilities_and_resumes(config, model, tmp_path):
    killed = dataclasses.replace(config, output=config.output + "-killed")
    records = run(config)
    assert records[0]["loss"] == pytest.approx(LN_2, abs=1e-6)
    assert records[-1]["loss"] < 0.5
    run(killed, stop_after=4)
    assert losses(run(killed)) == losses(records)[4:]

    table = np.load(tmp_path / "run" / "reference.npz")["table"]
    documents = training_data(config, model.config)
    expected = np.concatenate([alone(model, batch) for batch in documents.everything()])
    order = np.concatenate([b.document[b.document >= 0] for b in documents.everything()])
    assert sorted(order) == list(range(len(ROWS)))
    np.testing.assert_allclose(table[order], expected, atol=1e-4)


def alone(model, batch):
    """The log-probabilities [pairs, 2] of each answer of a batch, in a forward pass of its own."""
    found = []
    for tokens, segments, learned in zip(*batch[:3], strict=True):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            own, counts = jnp.asarray(tokens[here])[None], learned[here][1:]
            positions = jnp.arange(own.shape[1])[None]
            out = forward(model.config, model.params, own, positions, jnp.ones_like(own))
            log_p = jax.nn.log_softmax(unembed(model.config, model.params, out.hidden))[0, :-1]
            chosen = np.take_along_axis(np.asarray(log_p), np.asarray(own)[0, 1:, None], -1)[:, 0]
            found.append(chosen[counts].sum())
    return np.array(found).reshape(-1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["data=2,tensor=2", "fsdp=2,expert=2,sequence=2"])
def test_meshes_take_the_same_steps(config, spec):
    config = dataclasses.replace(config, steps=3, save_every=0)
    other = dataclasses.replace(config, output=config.output + "-mesh")
    mesh = MeshConfig.parse(spec).make(jax.devices()[: 4 if "data" in spec else 8])
    found = run(other, mesh)
    np.testing.assert_allclose(losses(found), losses(run(config)), rtol=1e-4)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 2.*'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "line 2.*'rejected'.*3"),
        (pair("a", "b", "c") | {"rejected": []}, "line 2.*'rejected' has no answer"),
        ({"text": "abc"}, "line 2.*'chosen'"),
        (pair("a", "b", "c") | {"chosen": "b"}, "line 2.*not all texts or all messages"),
    ],
)
def test_a_row_that_is_no_pair_is_named(config, tmp_path, row, said):
    write(tmp_path / "pairs.jsonl", [ROWS[0], row])
    with pytest.raises(UserError, match=said):
        run(config)


@pytest.mark.parametrize("given", [None, "the prompt's messages", "its text"])
def test_whole_conversations_have_their_prompt_once(given):
    row = pair("a", "b", "c")
    whole = {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
    prompt = {"the prompt's messages": row["prompt"], "its text": "a"}.get(given)
    assert pair_of(whole | {"prompt": prompt}) == pair_of(row)


def test_a_reference_of_other_pairs_is_refused(config, tmp_path):
    run(config, stop_after=4)
    write(tmp_path / "pairs.jsonl", [pair("other", "a", "b"), *ROWS[1:]])
    shutil.rmtree(tmp_path / "run" / "data")
    with pytest.raises(UserError, match="is of other pairs"):
        run(config)


def test_pairs_are_never_cut(config, model, tmp_path):
    long = pair("a", "b" * LENGTH, "c")
    write(tmp_path / "pairs.jsonl", [*ROWS, long])
    with pytest.raises(UserError, match="longer than data"):
        training_data(config, model.config)
    data = dataclasses.replace(config.data, too_long="truncate")
    changed = dataclasses.replace(config, data=data, output=config.output + "-cut")
    found = training_data(changed, model.config)
    kept = np.concatenate([b.document[b.document >= 0] for b in found.everything()])
    assert sorted(kept) == list(range(len(ROWS)))


def test_a_file_of_tokens_has_no_pairs(config, tmp_path):
    np.save(tmp_path / "tokens.npy", np.zeros(1000, np.int32))
    data = DataConfig(tokens=str(tmp_path / "tokens.npy"), length=LENGTH, batch_size=4)
    with pytest.raises(UserError, match=re.escape("data.tokens has none")):
        run(dataclasses.replace(config, data=data))


def test_a_lost_reference_ends_a_run_that_has_begun(config, tmp_path):
    run(config, stop_after=4)
    (tmp_path / "run" / "reference.npz").unlink()
    with pytest.raises(UserError, match=r"reference\.npz is missing"):
        run(config)
