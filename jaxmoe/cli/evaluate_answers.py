"""`jaxmoe evaluate answers`: how many questions, with or without pictures, are answered right."""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax

from jaxmoe.checkpoint import store
from jaxmoe.cli import devices
from jaxmoe.errors import UserError
from jaxmoe.eval import needle_report
from jaxmoe.eval.answers import grade, summary, table
from jaxmoe.files.outputs import check_writable, write_json
from jaxmoe.generation import jobs
from jaxmoe.generation.checking import Checker
from jaxmoe.generation.engine import generate
from jaxmoe.generation.request import Request, stop_ids_of
from jaxmoe.generation.request_keys import check_count
from jaxmoe.generation.sampling import Sampling
from jaxmoe.images import read_image_settings
from jaxmoe.parsing import MAX_TEXT_BYTES, parse_json, read_text
from jaxmoe.progress import task_progress
from jaxmoe.text import Tokenizer

KEYS = ("answer", "group")  # of a line, beside those of a request
Record = dict[str, Any]


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand and its flags."""
    parser = commands.add_parser("answers", help="the accuracy of answers to questions")
    parser.add_argument("checkpoint", help="folder that jaxmoe convert wrote")
    parser.add_argument(
        "questions",
        metavar="QUESTIONS.jsonl",
        help='lines as for jaxmoe generate, with the right "answer" and perhaps a "group"',
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="requests in a batch")
    parser.add_argument("--json", metavar="FILE", help="every answer, and the summary")
    devices.add_flags(parser)
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> None:
    """Runs the command."""
    check_count("--rows", args.rows)
    mesh = devices.start(args)
    if args.json:
        check_writable(args.json)
    tokenizer = devices.required_tokenizer(args.checkpoint)
    model, greedy = store.read_config(args.checkpoint), Sampling(temperature=0.0)
    expected = read_expected(args.questions)
    lines = jobs.read_requests(
        args.questions,
        tokenizer,
        args.max_new_tokens,
        Checker(model, tokenizer, greedy, 0, None).check,
        default=greedy,
        images=read_image_settings(args.checkpoint, model.vision) if model.vision else None,
        ignored=KEYS,
    )
    requests = [line for line in lines if isinstance(line, Request)]
    answers = {str(line.id): line.record for line in lines if isinstance(line, jobs.Refusal)}
    text_only = not any(request.pictures for request in requests)
    config, params = devices.load(args, mesh, text_only)
    with jax.set_mesh(mesh):
        options = {"rows": args.rows, "tokenizer": tokenizer}
        options["stop_ids"] = stop_ids_of(model, tokenizer)
        stream = generate(config, params, requests, greedy, **options)
        answers |= _answers(stream, requests, tokenizer)
    refused = {"error": "its id is neither text nor an integer"}
    records = [_graded(answers.get(id_, refused), line) for id_, line in expected.items()]
    if args.json:
        write_json(args.json, {"summary": summary(records), "answers": records})
    _print_errors(records)
    needle_report.show(table(records))


def read_expected(path: str | Path) -> dict[str, Record]:
    """The lines of a file of questions by their ids.

    Raises:
        UserError: if a line has no right answer, or asks for several answers.
    """
    expected: dict[str, Record] = {}
    for number, line in enumerate(read_text(path, MAX_TEXT_BYTES).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        record = parse_json(line, where)
        if not isinstance(record, dict) or not isinstance(record.get("answer"), str):
            raise UserError(f'{where} has no "answer" that is text; write the right one.')
        if not isinstance(record.get("group", ""), str) or record.get("n", 1) != 1:
            raise UserError(f'{where} has a "group" that is no text, or "n"; remove it.')
        if str(record.get("id")) in expected:
            raise UserError(
                f"{where} has the id {record.get('id')!r} of an earlier line; change it."
            )
        expected[str(record.get("id"))] = record
    return expected


def _answers(stream, requests: list[Request], tokenizer: Tokenizer) -> dict[str, Record]:
    """The records of the answers by the ids of their questions."""
    answers = {}
    with task_progress("Answering", len(requests), "questions") as advance:
        for _, record in jobs.finished(stream, tokenizer):
            if record is not None:
                answers[str(record["id"])] = record
                advance(1)
    return answers


def _graded(answer: Record, line: Record) -> Record:
    """A question's record: what is expected, what was answered, and how right that is."""
    text, expected = answer.get("text", ""), line["answer"]
    error = {"error": answer["error"]} if "error" in answer else {}
    about = {"id": line.get("id"), "group": line.get("group", "all"), "expected": expected}
    return about | {"text": text} | grade(expected, text) | error


def _print_errors(records: list[Record]) -> None:
    failed = [record for record in records if "error" in record]
    if failed:
        print(
            f"{len(failed)} of {len(records)} questions have no answer, which counts as wrong: "
            f"{failed[0]['error']}",
            file=sys.stderr,
        )
