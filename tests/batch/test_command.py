"""`jaxmoe batch` from files and object stores to answers that OpenAI's package reads."""

import json
import os
import signal
from pathlib import Path

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from jaxmoe.batch.storage import storage_of
from tests.batch import fake
from tests.scripts import refuses, run, succeeds, together

DEMO = Path(__file__).parents[2] / "demo/model"


def body(url, **asked):
    return {"url": f"/v1/{url}", "method": "POST", "body": {"model": "demo", **asked}}


SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
USER = {"role": "user", "content": "Hello world!"}
LINES = [  # such as OpenAI's and vLLM's documents show, and what goes wrong in such files
    {"custom_id": "request-1"} | body("chat/completions", messages=[SYSTEM, USER], max_tokens=6),
    {"custom_id": "request-2"}
    | body("chat/completions", messages=[USER], max_completion_tokens=6, n=2, temperature=1),
    {"custom_id": "text"} | body("completions", prompt=["In the", "And God"], max_tokens=4),
    {"custom_id": "vector"} | body("embeddings", input="Hello"),
    {"custom_id": "request-1"} | body("chat/completions", messages=[USER], max_tokens=6),
    {"id": 7, "prompt": "In the beginning", "max_tokens": 4, "page": 3},
    {"prompt": "And God said", "max_tokens": 4},
    {"id": 8, "prompt": "In the beginning", "top_p": 3},
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    checkpoint = tmp_path_factory.mktemp("batch") / "demo"
    succeeds("convert.py", DEMO, checkpoint)
    return checkpoint


@pytest.mark.slow
def test_openais_lines_run_as_they_are(demo, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps(line) + "\n" for line in LINES) + "{torn\n")
    command = ("batch.py", demo, "--input", source, "--output", output, "--temperature", 0)
    done = run(*command)
    assert done.returncode == os.EX_DATAERR, done.stderr
    assert "5 rows." in done.stderr and "4 rows failed" in done.stderr
    lines = fake.lines_of(output)
    chat, several, text, own, unnamed = lines
    for line, kind in ((chat, ChatCompletion), (several, ChatCompletion), (text, Completion)):
        reply = kind.model_validate(line["response"]["body"])
        assert line["error"] is None and reply.usage.completion_tokens
        assert all(choice.finish_reason == "length" for choice in reply.choices)
    assert [len(line["response"]["body"]["choices"]) for line in (chat, several, text)] == [1, 2, 2]
    assert (own["id"], own["page"], unnamed["id"]) == (7, 3, "row-7")
    vector, repeated, wrong, torn = fake.lines_of(output, "errors")
    assert vector["response"]["status_code"] == 400 and "embeddings" in json.dumps(vector)
    assert "of an earlier row" in repeated["response"]["body"]["error"]["message"]
    assert wrong["id"] == 8 and "top_p" in wrong["error"]
    assert "line 9" in torn["error"]
    again = run(*command)  # all is there: no model is loaded
    assert (again.returncode, again.stderr) == (done.returncode, done.stderr)
    refuses(*command, "--n", 2, words=[output, "another job"])


@pytest.mark.slow
def test_a_store_that_fails_gets_each_answer_once(small, store, proxy, tmp_path):
    """From an object store to itself, by two programs: slow, busy, and with lost replies."""
    rows = fake.write_rows(tmp_path / "in.jsonl", 24).read_bytes().splitlines(keepends=True)
    storage_of(store).put("in/a.jsonl", b"".join(rows[:9]))
    storage_of(store).put("in/b.jsonl", b"".join(rows[9:]))
    proxy.faults["PUT"] = ["ok", "lost", "busy", "ok", "slow", "lost", "lost"]
    proxy.faults["GET"] = ["busy", "slow"]
    flags = ("--input", f"{store}/in/*.jsonl", "--output", f"{store}/out", "--block-rows", 4)
    command = ("batch.py", small.checkpoint, *flags)
    codes, _, said = together.ends([together.start(*command) for _ in range(2)])
    assert codes == [0, 0], said
    assert not proxy.faults["PUT"]
    names = storage_of(f"{store}/out").names("answers/")
    parts = [storage_of(f"{store}/out").read(name) for name in names]
    ids = [json.loads(line)["id"] for part in parts for line in (part or b"").splitlines()]
    assert ids == [f"r{n}" for n in range(24)]


def test_each_process_of_a_scheduler_may_be_an_engine(small, tmp_path):
    """They share the rows, and one that is stopped delays no other for longer than its lease."""
    source, output = fake.write_rows(tmp_path / "in.jsonl", 40), tmp_path / "out"
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "here", "SLURM_NTASKS": "2"}
    flags = ("--input", source, "--output", output, "--block-rows", 4, "--engines", "each")
    both = [
        together.start(
            "batch.py", small.checkpoint, *flags, "--lease", 2, **step, SLURM_PROCID=str(i)
        )
        for i in range(2)
    ]
    while not list(output.glob("leases/*")):
        assert both[0].poll() is None, both[0].communicate()
    owners = {path.read_text() for path in output.glob("leases/*")}
    assert owners
    both[0].send_signal(signal.SIGSTOP)
    codes, _, said = together.ends(both[1:])
    assert codes == [0], said
    both[0].send_signal(signal.SIGCONT)
    codes, _, said = together.ends(both[:1])
    assert codes == [0], said
    assert [line["id"] for line in fake.lines_of(output)] == [f"r{n}" for n in range(40)]
