"""generate.py: text to the terminal, JSON lines through files, and every mistake in one line."""

import dataclasses
import json
import re

import jax
import pytest

import jaxmoe
from jaxmoe.checkpoint.convert import convert
from jaxmoe.cli import devices, generate
from jaxmoe.errors import UserError
from jaxmoe.generation import jobs
from jaxmoe.text import Tokenizer
from tests import tiny
from tests.conftest import one_device
from tests.scripts import refuses, succeeds
from tests.small_tokenizers import CHAT as SPECIALS
from tests.small_tokenizers import trained_backend

CONTEXT = 96
CONFIG = tiny.scout_like(
    num_hidden_layers=2,  # one local, one global
    no_rope_layer_interval=2,
    vocab_size=320,
    max_position_embeddings=CONTEXT,
    eos_token_id=[300, 310],
)


@pytest.fixture(scope="module")
def tokenizer():
    """A small byte-level BPE; the embedding has more rows than it has tokens."""
    corpus = ["the rain in the plain and the train in the drain"] * 9
    return Tokenizer(trained_backend(corpus, 290, SPECIALS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("generate")
    tiny.write_checkpoint(folder / "hf", CONFIG, tiny.random_tensors(CONFIG, seed=5))
    tokenizer.save(folder / "hf")
    convert(folder / "hf", folder / "orbax")
    return folder / "orbax"


@pytest.fixture
def prompts(tmp_path):
    """Writes records as JSON lines."""

    def write(*records):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.mark.slow
def test_one_device_and_eight_write_the_same(checkpoint, tokenizer, prompts, tmp_path):
    """Sampled; one output on stdout, one in a file."""
    path = prompts(
        {"id": "text", "prompt": "the rain"},
        {"id": 7, "messages": [{"role": "user", "content": "in the plain?"}]},
        {"id": "long", "tokens": list(range(50))},
        {"id": "short", "tokens": [5]},
    )
    options = "--prompts", path, "--max-new-tokens", 24, "--temperature", 1
    stdout, _ = succeeds("generate.py", checkpoint, *options, "--cpu-devices", 1)
    output, mesh = tmp_path / "out.jsonl", "expert=2,sequence=2,tensor=2"
    eight = *options, "--output", output, "--mesh", mesh, "--cpu-devices", 8
    assert succeeds("generate.py", checkpoint, *eight)[0] == ""
    assert sorted(output.read_text().splitlines()) == sorted(stdout.splitlines())
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["id"] for record in records] == ["text", 7, "long", "short"]
    for record in records:
        assert list(record) == ["id", "text", "tokens", "finish_reason", "usage"]
        assert record["text"] == tokenizer.decode(record["tokens"])
        stopped = record["tokens"][-1] in CONFIG["eos_token_id"]
        assert record["finish_reason"] == ("stop" if stopped else "length")
        assert len(record["tokens"]) == 24 or stopped


def test_a_prompt_streams_its_answer_to_stdout(checkpoint, tokenizer, tmp_path):
    """Only the answer: it may be piped on. The prompt and the closing line are on stderr."""
    output = tmp_path / "out.jsonl"
    options = "--prompt", "the rain", "--max-new-tokens", 24, "--temperature", 0
    stdout, stderr = succeeds("generate.py", checkpoint, *options, "--output", output)
    record = json.loads(output.read_text())
    assert stdout == record["text"] + "\n"
    assert record["text"] == tokenizer.decode(record["tokens"]) != ""
    assert stderr.startswith("the rain")
    assert f"[{len(record['tokens'])} tokens, " in stderr.splitlines()[-1]


def test_flags_are_the_settings_of_lines_that_do_not_say(checkpoint, tokenizer, prompts, untyped):
    path = prompts(
        {"id": "flags", "prompt": "the rain"},
        {
            "id": "own",
            "prompt": "the rain",
            "n": 1,
            "logprobs": 0,
            "min_tokens": 1,
            "max_tokens": 3,
        },
    )
    flags = "--temperature 1 --top-p 1 --min-p 0.01 --top-k 90 --seed 3 --min-tokens 6 --n 2"
    flags += " --repetition-penalty 1.1 --presence-penalty 0.5 --frequency-penalty 0.1 --ignore-eos"
    flags += " --stop zzz --stop yyy --stop-id 7 --logprobs 1 --prompt-logprobs 0 --step-tokens 16"
    options = "--prompts", path, "--max-new-tokens", 8, *flags.split()
    stdout, _ = succeeds("generate.py", checkpoint, *options)
    records = {record["id"]: record for record in map(json.loads, stdout.splitlines())}
    assert set(records) == {"flags#0", "flags#1", "own"}
    assert records["flags#0"]["tokens"] != records["flags#1"]["tokens"]
    for id_, record in records.items():
        entries = record["logprobs"]["content"]
        assert len(entries) == len(record["tokens"]) <= (3 if id_ == "own" else 8)
        assert {len(entry["top_logprobs"]) for entry in entries} == {0 if id_ == "own" else 1}
        assert len(record["prompt_logprobs"]) == len(tokenizer.encode("the rain", bos=True))
        assert len(record["tokens"]) >= (1 if id_ == "own" else 6)
    llm = jaxmoe.LLM(checkpoint, mesh=one_device(), step_tokens=16)
    sampling = jaxmoe.Sampling(
        temperature=1.0,
        top_p=1.0,
        min_p=0.01,
        top_k=90,
        seed=3,
        min_tokens=6,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=0.1,
        ignore_eos=True,
        stop=("zzz", "yyy"),
        stop_ids=(7,),
    )
    (request,) = jobs.read_requests(path, tokenizer, 8)[:1]
    request = dataclasses.replace(request, id="flags#1", sampling=sampling)
    with jax.set_mesh(llm.mesh):
        stream = jaxmoe.generate(
            llm.config, llm.params, [request], sampling, stop_ids=(300, 310), tokenizer=tokenizer
        )
        *_, last = stream
    assert records["flags#1"]["tokens"] == last.completion.tokens


def test_several_answers_are_printed_whole_and_in_order(checkpoint, tokenizer, tmp_path):
    output, regex = tmp_path / "out.jsonl", "(rain|plain){1,3}"
    options = "--prompt", "the", "--n", 3, "--temperature", 1, "--regex", regex
    stdout, stderr = succeeds("generate.py", checkpoint, *options, "--output", output)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["id"] for record in records] == ["0#0", "0#1", "0#2"]
    assert stdout.splitlines() == [record["text"] for record in records]
    assert all(re.fullmatch(regex, record["text"]) for record in records)
    assert re.findall(r"\[(0#\d): \d+ tokens, stop\]", stderr) == ["0#0", "0#1", "0#2"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--logprobs", 1], ["--logprobs", "--output"]),
        (["--n", 0], ["--n 0"]),
        (["--head", "nowhere"], ["nowhere"]),
        (["--n", 2, "--temperature", 0], ["equal answers"]),
        (["--min-p", 2], ["min_p 2.0"]),
        (["--stop", ""], ["stop holds ''"]),
        (["--json-schema", '{"not": {}}'], ["--json-schema", '"not"']),
        (["--grammar", "nowhere.lark"], ["nowhere.lark"]),
        (["--regex", "("], ["--regex", "unclosed"]),
        (["--regex", "a", "--ignore-eos"], ["ignore_eos"]),
        (["--min-tokens", 9, "--max-new-tokens", 3], ["at least 9"]),
    ],
)
def test_settings_that_cannot_be_are_refused(checkpoint, monkeypatch, options, words):
    """Before the model is loaded."""
    monkeypatch.setattr(devices, "start", lambda args: None)
    command = ["generate", str(checkpoint), "--prompt", "the", *map(str, options)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(UserError) as caught:
        generate.main()
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("record", "options", "words"),
    [
        ({}, ["--mesh", "expert=4", "--cpu-devices", 8], ["expert=4", "8 device"]),
        (
            {},
            ["--mesh", "tensor=8", "--cpu-devices", 8],
            ["tensor=8", "kv_heads", "does not divide"],
        ),
        ({"tokens": [1] * CONTEXT}, [], ["'a'", f"{CONTEXT} tokens", "context"]),
    ],
    ids=["mesh and devices", "mesh and model", "long"],
)
def test_mistakes(checkpoint, prompts, tmp_path, record, options, words):
    path, output = prompts({"id": "a", "tokens": [1]} | record), tmp_path / "out.jsonl"
    refuses("generate.py", checkpoint, "--prompts", path, "--output", output, *options, words=words)
    assert not output.exists()


def test_a_line_that_is_no_json_is_named(checkpoint, tmp_path):
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"id": 2, "tokens": [1}\n')
    words = [f"{path} line 1", "not JSON"]
    refuses("generate.py", checkpoint, "--prompts", path, "--output", output, words=words)
    assert not output.exists()


def test_an_existing_output_is_kept(checkpoint, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    options = "--prompts", prompts({"id": 1, "tokens": [1]}), "--output", output
    refuses("generate.py", checkpoint, *options, words=[output, "not empty"])
    assert output.read_text() == "precious\n"


def test_a_missing_checkpoint_is_named(tmp_path):
    refuses("generate.py", tmp_path / "nowhere", "--prompt", "a", words=[tmp_path / "nowhere"])


def test_what_is_not_converted_is_no_checkpoint(checkpoint):
    source = checkpoint.with_name("hf")
    refuses("generate.py", source, "--prompt", "a", words=[source, "jaxmoe convert"])


def test_a_prompt_needs_a_tokenizer(small):
    refuses("generate.py", small.checkpoint, "--prompt", "a", words=[small.checkpoint, "tokenizer"])
