"""A job whose inputs and outputs are on an object store that refuses, delays and loses replies."""

import gzip
import json

from openai.types import Completion

from jaxmoe.batch.storage import storage_of
from tests.batch import fake

METHODS = ("GET", "PUT", "HEAD", "POST")
FAULTS = ["lost", "ok", "busy"]


def line_of(number: int) -> dict:
    body = {"model": "m", "prompt": [number + 1], "max_tokens": 3}
    return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}


def test_every_row_is_answered_once(store, proxy):
    place = storage_of(store)
    lines = [json.dumps(line_of(number)) for number in range(9)]
    place.put(
        "in/a.jsonl.gz", gzip.compress("\n".join([*lines[:5], '{"custom_id": "torn']).encode())
    )
    place.put("in/b.jsonl", "\n".join(lines[5:]).encode())
    for most in (3, None):  # a program that ends early, and another
        proxy.faults |= {method: list(FAULTS) for method in METHODS}
        with fake.open_job(f"{store}/out", f"{store}/in") as job:
            fake.answer(job, most=most)
    assert job.done
    proxy.faults.clear()
    report = job.summarize()
    assert (report["answered"], report["failed"]) == (9, 1)
    names = [name for name in place.names("out/") if name.startswith(("out/answers", "out/errors"))]
    contents = [json.loads(line) for name in names for line in place.read(name).splitlines()]
    assert [line["custom_id"] for line in contents] == [*(f"r{n}" for n in range(9)), "row-6"]
    for number, line in enumerate(contents[:-1]):
        read = Completion.model_validate(line["response"]["body"], strict=True)
        assert read.usage.completion_tokens == 3 and line["custom_id"] == f"r{number}"
    assert contents[-1]["response"]["status_code"] == 400
    assert not place.names("out/leases/") and not place.names("out/workers/")
