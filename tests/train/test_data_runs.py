"""Runs on rows of texts and chats: batches, masks, losses, resuming, and what stops them."""

import dataclasses
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.hf_config import from_hf
from jaxmoe.train import documents
from jaxmoe.train.batches import training_data
from jaxmoe.train.config import DataConfig, OptimizerConfig, SourceConfig, TrainConfig
from jaxmoe.train.data import Batch
from jaxmoe.train.evaluation import held_out_loss
from jaxmoe.train.loss import next_token_loss
from jaxmoe.train.state import random_params
from jaxmoe.train.trainer import train
from tests import tiny
from tests.conftest import one_device
from tests.small_tokenizers import CHAT, byte_tokenizer

TOKENIZER = byte_tokenizer(CHAT)
MODEL = tiny.scout_like(
    num_hidden_layers=2,
    no_rope_layer_interval=2,  # one local layer, one global
    hidden_size=32,
    intermediate_size=32,
    num_local_experts=4,
    vocab_size=272,
    attention_chunk_size=16,
    bos_token_id=TOKENIZER.bos_id,
    eos_token_id=list(TOKENIZER.stop_ids),
    pad_token_id=0,
)
CONFIG = from_hf(MODEL, "test")
LENGTH = 64


def chat(question, answer, **others):
    user = {"role": "user", "content": question}
    return {"messages": [user, {"role": "assistant", "content": answer} | others]}


ROWS = [chat(f"{i}?", "abcdefgh"[: 1 + i % 8]) for i in range(30)]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def config(tmp_path):
    TOKENIZER.save(tmp_path)
    return TrainConfig(
        model=MODEL,
        tokenizer=str(tmp_path),
        data=DataConfig(
            files=(write(tmp_path / "chats.jsonl", ROWS),),
            length=LENGTH,
            batch_size=4,
            held_out_every=10,
        ),
        optimizer=OptimizerConfig(peak_lr=0.02, warmup_steps=2),
        output=str(tmp_path / "run"),
        steps=12,
        log_every=1,
        save_every=4,
    )


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def with_rows(config, rows, **changes):
    write(Path(config.data.files[0]), rows)
    return with_data(config, **changes)


def run(config, stop_after=None):
    mesh, records = one_device(), []
    with jax.set_mesh(mesh):
        for record in train(config, mesh, "run.yaml"):
            records.append(record)
            if record["step"] == stop_after:
                break
    return records


def segments(batch):
    """The text and the learned text of each segment of a batch."""
    found = []
    for tokens, ids, learned in zip(*batch[:3], strict=True):
        for number in range(1, ids.max() + 1):
            mine = ids == number
            texts = tokens[mine], tokens[mine & learned]
            found.append(tuple(TOKENIZER.decode(x.tolist(), skip_special=False) for x in texts))
    return found


def header(role):
    return f"<|header_start|>{role}<|header_end|>\n\n"


def rendered(i):
    answer = ROWS[i]["messages"][1]["content"] + "<|eot|>"
    start = f"<|begin_of_text|>{header('user')}{i}?<|eot|>{header('assistant')}"
    return start + answer, answer


def test_an_epoch_has_every_document_whole_and_once_with_its_mask(config):
    data = training_data(config, CONFIG)
    count = int(re.match(r"27 documents in (\d+) rows of 64 tokens", data.summary)[1])
    rows = [row for step in range(count) for row in zip(*data.batches(step)[:3], strict=True)]
    for epoch in (rows[:count], rows[count : 2 * count]):
        found = segments(Batch(*map(np.stack, zip(*epoch, strict=True))))
        assert sorted(found) == sorted(rendered(i) for i in range(30) if i % 10 != 9)
    held_out = [x for batch in data.held_out() for x in segments(batch)]
    assert sorted(held_out) == sorted(rendered(i) for i in (9, 19, 29))
    assert "3 held out" in data.summary


def nats(params, batch):
    """The cross entropy of a batch's targets, summed."""
    targets = (batch.segment_ids != 0)[:, 1:] & batch.learned[:, 1:]
    found = next_token_loss()(CONFIG, params, batch)[1]["loss"]
    return float(found) * targets.sum()


@pytest.mark.slow
def test_packed_documents_lose_what_each_loses_alone(config):
    batch = training_data(config, CONFIG).batches(0)
    with jax.set_mesh(one_device()):
        params = random_params(CONFIG, one_device(), seed=0)
        packed = nats(params, batch)
        total, count = 0, 0
        for row in range(4):
            for number in range(1, batch.segment_ids[row].max() + 1):
                mine = np.flatnonzero(batch.segment_ids[row] == number)
                alone = Batch(*(np.zeros_like(x) for x in batch[:3]))
                for own, every in zip(alone[:3], batch[:3], strict=True):
                    own[0, : len(mine)] = every[row, mine]
                total, count = total + nats(params, alone), count + 1
        held = held_out_loss(config, CONFIG, params, batches=[batch])["held_out_loss"]
    assert count > 4
    np.testing.assert_allclose(packed, total, rtol=1e-5)
    targets = (batch.learned & (batch.segment_ids != 0)).sum()
    np.testing.assert_allclose(held, packed / targets, rtol=1e-5)


@pytest.mark.slow
def test_a_run_learns_and_resumes_from_the_same_documents(config, monkeypatch):
    records = run(config)
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    assert 0 < records[-1]["held_out_loss"] < records[0]["loss"]
    killed = dataclasses.replace(config, output=config.output + "-killed")
    run(killed, stop_after=6)
    monkeypatch.setattr(documents, "_build", None)  # they are not tokenized again
    resumed = run(killed)
    losses = {r["step"]: r["loss"] for r in records}
    assert [r["step"] for r in resumed] == list(range(5, 13))
    assert all(r["loss"] == losses[r["step"]] for r in resumed)


def test_a_bad_row_stops_the_run_before_anything_is_written(config):
    for bad, words in {
        "{": r"chats\.jsonl line 2 is not JSON",
        '{"messages": [{"role": "alien", "content": "x"}]}': r"line 2: messages\[0\] has no known",
        '{"txt": 3}': r"line 2: it has none of 'messages'.* data\.on_bad to skip",
        '{"text": "\\ud800"}': r"line 2: the text holds '.*d800', half of a surrogate",
    }.items():
        lines = [json.dumps(ROWS[0]), bad]
        Path(config.data.files[0]).write_text("\n".join(lines))
        with pytest.raises(UserError, match=words):
            run(config)
        assert not Path(config.output).exists()


def test_bad_rows_are_skipped_counted_and_listed(config):
    bad = with_rows(config, [ROWS[0], {"txt": 3}, *ROWS[1:]], on_bad="skip")
    data = training_data(bad, CONFIG)
    assert "27 documents" in data.summary and "1 skipped" in data.summary
    (line,) = open(f"{config.output}/data/skipped.jsonl")
    assert json.loads(line)["row"].endswith("chats.jsonl line 2")
    assert set(segments(data.batches(0))) <= {rendered(i) for i in range(30)}


def test_long_documents_stop_the_run_unless_said_otherwise(config):
    long = chat("why?", "x" * 2 * LENGTH)
    config = with_rows(config, [*ROWS, long])
    words = r"1 of 31 documents are longer than data\.length, 64: .*line 31 has 1\d\d tokens; raise"
    with pytest.raises(UserError, match=words):
        training_data(config, CONFIG)
    kept = {x: training_data(with_data(config, too_long=x), CONFIG) for x in ("drop", "split")}
    assert "27 documents" in kept["drop"].summary
    assert "1 too long or with nothing to learn" in kept["drop"].summary
    assert "28 documents" in kept["split"].summary
    found = {x for step in range(9) for x in segments(kept["split"].batches(step))}
    assert ("x" * LENGTH, "x" * LENGTH) in found  # a part in the middle


def test_a_part_without_a_target_is_left_out(config):
    config = with_rows(config, [*ROWS, chat("y" * 99, "x")], too_long="truncate")
    assert "1 too long or with nothing to learn" in training_data(config, CONFIG).summary
    config = with_data(
        config, files=(write(Path(config.output + ".jsonl"), [chat("", "", weight=0)]),)
    )
    config = dataclasses.replace(with_data(config, held_out_every=0), output=config.output + "2")
    with pytest.raises(UserError, match="without anything to learn: of its 1 documents none"):
        training_data(config, CONFIG)


def test_data_that_changed_since_the_run_began_is_refused(config):
    training_data(config, CONFIG)
    with pytest.raises(UserError, match="data was made of other data: the files, the tokenizer"):
        training_data(with_rows(config, ROWS[1:]), CONFIG)


def test_what_a_killed_process_left_is_made_anew(config):
    partial = Path(config.output) / "data.partial"
    partial.mkdir(parents=True)
    (partial / "tokens.bin").write_bytes(b"123")
    records = run(dataclasses.replace(config, steps=1))
    assert len(records) == 1 and not partial.exists()


@pytest.fixture
def mixed(config, tmp_path):
    """A run on chats, and on three times as many rows of texts."""
    texts = write(tmp_path / "texts.jsonl", [{"text": "z" * 40} for _ in range(9)])
    sources = (
        SourceConfig(path=config.data.files[0], weight=1.0, name="chats"),
        SourceConfig(path=texts, weight=3.0),
    )
    return with_data(config, files=(), sources=sources)


def test_sources_have_their_shares_of_the_rows(mixed):
    data = training_data(mixed, CONFIG)
    batches = [data.batches(step) for step in range(64)]
    is_text = np.array([batch.tokens == TOKENIZER.encode("z")[0] for batch in batches]).any(-1)
    real = np.array([batch.segment_ids > 0 for batch in batches])
    wanted = np.where(is_text[..., None], 1, 0) * real
    np.testing.assert_array_equal([batch.source for batch in batches], wanted)
    share = is_text.mean()
    assert 0.6 < share < 0.9  # of 256 rows, about three quarters


@pytest.mark.slow
def test_losses_of_sources_are_recorded(mixed, tmp_path):
    """Catches a loss of a source without targets in a step, and held-out files among sources."""
    other = write(tmp_path / "other.jsonl", [chat("other?", "yes")])
    names = mixed.data.source_names
    assert names == ("chats", str(tmp_path / "texts.jsonl"))
    mixed = with_data(mixed, held_out_every=5, held_out=(other,))
    mixed = dataclasses.replace(mixed, steps=6, accumulate=2, save_every=0)
    mixed = with_data(mixed, batch_size=1)
    records = run(mixed)
    for record in records:
        targets = [record[f"targets/{name}"] for name in names]
        shares = [n * record[f"loss/{name}"] for n, name in zip(targets, names, strict=True) if n]
        np.testing.assert_allclose(sum(shares), record["loss"] * record["targets"], rtol=1e-5)
        assert sum(targets) == record["targets"]
        assert [f"loss/{name}" in record for name in names] == [n > 0 for n in targets]
    assert {0} < {record["targets/chats"] for record in records}
    assert records[-1].keys() >= {f"held_out_loss/{name}" for name in names}
    assert (Path(mixed.output) / "losses.png").exists()


def test_held_out_losses_of_sources(mixed, tmp_path):
    other = write(tmp_path / "other.jsonl", [chat("other?", "yes")])
    mixed = with_data(mixed, held_out_every=5, held_out=(other,))
    data, one_source = training_data(mixed, CONFIG), with_data(mixed, sources=(), files=("x",))
    with jax.set_mesh(one_device()):
        params = random_params(CONFIG, one_device(), seed=0)
        found = held_out_loss(mixed, CONFIG, params, batches=data.held_out())
        of_all = held_out_loss(one_source, CONFIG, params, batches=data.held_out())
        assert of_all == {"held_out_loss": found["held_out_loss"]}
        for number, name in enumerate(mixed.data.source_names):
            own = (x._replace(learned=x.learned & (x.source == number)) for x in data.held_out())
            alone = held_out_loss(one_source, CONFIG, params, batches=own)["held_out_loss"]
            np.testing.assert_allclose(found[f"held_out_loss/{name}"], alone, rtol=1e-6)


def test_names_of_sources(mixed):
    first, second = mixed.data.sources
    twice = (first, dataclasses.replace(second, name="chats"))
    with pytest.raises(UserError, match="two of 'sources' are called 'chats'"):
        with_data(mixed, sources=twice)
    unweighted = tuple(dataclasses.replace(x, weight=None) for x in twice)
    with pytest.raises(UserError, match="a 'name' and no 'weight'"):
        with_data(mixed, sources=unweighted)


def test_files_may_be_held_out(config, tmp_path):
    held_out = (write(tmp_path / "other.jsonl", [chat("other?", "yes")]),)
    data = training_data(with_data(config, held_out=held_out, held_out_every=0), CONFIG)
    ((_, said),) = [x for batch in data.held_out() for x in segments(batch)]
    assert said == "yes<|eot|>" and "30 documents" in data.summary


def test_texts_need_a_tokenizer_that_fits(config):
    with pytest.raises(UserError, match="data of texts needs a tokenizer"):
        training_data(dataclasses.replace(config, tokenizer=None), CONFIG)
    small = dataclasses.replace(CONFIG, vocab_size=99)
    with pytest.raises(UserError, match="a tokenizer of 260 tokens, but the model has 99"):
        training_data(config, small)


def test_texts_and_completions_learn_what_they_should(config):
    rows = [{"text": "all of it"}, {"prompt": "1+1=", "completion": "2"}]
    data = training_data(with_rows(config, rows, held_out_every=0), CONFIG)
    begin = "<|begin_of_text|>"
    expected = {(begin + "all of it",) * 2, (begin + "1+1=2", "2")}
    assert set(segments(data.batches(0))) == expected


ONE_OF_TWO = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
from jaxmoe.errors import UserError
from jaxmoe.hf_config import from_hf
from jaxmoe.train.batches import training_data
from jaxmoe.train.config import read_train_config
config = read_train_config(sys.argv[3])
try:
    data = training_data(config, from_hf(config.model, "test"))
    print([data.batches(step).tokens.sum().item() for step in range(5)])
except UserError as error:
    print(error)
"""


def in_two_processes(config):
    """What each of two processes prints of the config's data."""
    path = Path(config.tokenizer) / "run.yaml"
    path.write_text(json.dumps(dataclasses.asdict(config)))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", ONE_OF_TWO]
    both = [
        subprocess.Popen([*command, str(i), address, str(path)], stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    return [process.communicate(timeout=120)[0].splitlines()[-1] for process in both]


def test_two_processes_see_the_same_batches_which_one_of_them_prepares(config):
    first, second = in_two_processes(config)
    alone = training_data(dataclasses.replace(config, output=config.output + "-alone"), CONFIG)
    assert first == second == str([alone.batches(i).tokens.sum().item() for i in range(5)])


def test_where_one_process_fails_the_other_does_too(config):
    first, second = in_two_processes(with_rows(config, [{"txt": 3}]))
    assert all("chats.jsonl line 1" in said for said in (first, second))
