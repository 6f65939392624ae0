"""A job without a model: answers are made of requests, so that only the job itself is tested."""

import json
from pathlib import Path

from jaxmoe.batch.feed import Feed
from jaxmoe.batch.job import Job, JobOptions
from jaxmoe.generation.jobs import RequestReader
from jaxmoe.generation.sampling import Sampling

FAILS = 13  # the token that a row fails with


def write_rows(path: Path, count: int, **extra) -> Path:
    rows = [{"id": f"r{n}", "tokens": [n % 100 + 1], "max_tokens": 3} | extra for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reader_of(folder: Path) -> RequestReader:
    return RequestReader(None, 8, lambda request: request, False, Sampling(temperature=0.0))


def record_of(request, failing=False) -> dict:
    usage = {"prompt_tokens": len(request.tokens), "completion_tokens": 3}
    record = {"id": request.id, "text": "", "tokens": [request.tokens[0]] * 3, "usage": usage}
    if failing and FAILS in request.tokens:
        return record | {"finish_reason": "error", "error": "thirteen"}
    return record | {"finish_reason": "length"}


def open_job(output, *inputs, settings="settings", **options) -> Job:
    given = {"block": 4, "expiry": 60.0} | options
    return Job(str(output), settings, list(map(str, inputs)), JobOptions(**given))


def answer(job: Job, most: int | None = None, failing: bool = False, first: bool = False) -> int:
    """Answers rows of a job, at most so many; returns how many it answered.

    Args:
        first: whether the last requests of each block come first.
    """
    feed, done = Feed(job, reader_of), 0
    while requests := feed.more(True):
        for request in reversed(requests) if first else requests:
            if done == most:
                return done
            feed.take_in(record_of(request, failing))
            done += 1
    return done


def lines_of(output: Path, folder: str = "answers") -> list[dict]:
    """All lines, in the order of the parts."""
    parts = sorted((output / folder).glob("*.jsonl")) if (output / folder).exists() else []
    return [json.loads(line) for part in parts for line in part.read_bytes().splitlines()]
