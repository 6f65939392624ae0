"""`jaxmoe evaluate loops`: how much of its own text a model repeats in long continuations."""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
from rich.table import Table

from jaxmoe.checkpoint import store
from jaxmoe.cli import devices
from jaxmoe.errors import UserError
from jaxmoe.eval import needle_report
from jaxmoe.eval.repetition import find_loop, seen_fraction
from jaxmoe.files.outputs import check_writable, write_json
from jaxmoe.generation.engine import Request, fit_context, generate
from jaxmoe.generation.sampling import Sampling
from jaxmoe.progress import task_progress
from jaxmoe.text import Tokenizer

NGRAMS = (4, 8, 16, 32)
PROMPTS = ("In the beginning", "The river", "Once there was a king who")
Record = dict[str, Any]


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand and its flags."""
    parser = commands.add_parser("loops", help="how much of long continuations repeats itself")
    parser.add_argument("checkpoint", help="folder that jaxmoe convert wrote")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be given again; default: our own"
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    parser.add_argument(
        "--temperatures", default="0,0.6,1", metavar="T,...", help="0: greedy; default: 0,0.6,1"
    )
    parser.add_argument("--top-p", type=float, default=0.9, metavar="P")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--ignore-stop", action="store_true", help="go on after an end of text")
    parser.add_argument("--json", metavar="FILE", help="every continuation, and the summary")
    devices.add_flags(parser)
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> None:
    """Runs the command."""
    samplings = read_samplings(args.temperatures, args.top_p, args.seed)
    mesh = devices.start(args)
    if args.json:
        check_writable(args.json)
    tokenizer = devices.required_tokenizer(args.checkpoint)
    model = store.read_config(args.checkpoint, text_only=True)
    requests = [
        fit_context(model, Request(i, tuple(tokenizer.encode(text, bos=True)), args.max_new_tokens))
        for i, text in enumerate(args.prompt or PROMPTS)
    ]
    config, params = devices.load(args, mesh, text_only=True)
    stop_ids = () if args.ignore_stop else (*config.eos_token_ids, *tokenizer.stop_ids)
    records = []
    total = len(samplings) * sum(request.max_new_tokens for request in requests)
    with jax.set_mesh(mesh), task_progress("Writing", total, "tokens") as advance:
        for sampling in samplings:
            stream = generate(config, params, requests, sampling, stop_ids=stop_ids)
            records += _continuations(stream, requests, sampling, tokenizer, advance)
    if args.json:
        write_json(args.json, {"summary": summary(records), "continuations": records})
    needle_report.show(table(records))


def _continuations(stream, requests, sampling, tokenizer: Tokenizer, advance) -> Iterator[Record]:
    """A record for each request, in their order."""
    written, reasons = defaultdict(list), {}
    for token in stream:
        advance(1)
        written[token.request.id].append(token.token)
        reasons[token.request.id] = token.finish_reason
    for request in requests:
        tokens = written[request.id]
        yield {
            "prompt": tokenizer.decode(request.tokens),
            "temperature": sampling.temperature,
            "tokens": len(tokens),
            "finish_reason": reasons[request.id],
            **measure(tokens),
            "text": tokenizer.decode(tokens),
        }


def measure(tokens: list[int]) -> Record:
    """How much of a continuation repeats itself, as plain numbers."""
    loop = find_loop(tokens)
    return {
        "seen_ngrams": {str(n): seen_fraction(tokens, n) for n in NGRAMS},
        "repeated_suffix": loop.repeated,
        "loop_period": loop.period,
        "loop_length": loop.length,
    }


def summary(records: list[Record]) -> list[Record]:
    """A record for each temperature, with means over its continuations."""
    groups: dict[float, list[Record]] = {}
    for record in records:
        groups.setdefault(record["temperature"], []).append(record)
    return [
        {
            "temperature": temperature,
            "continuations": len(group),
            "tokens": sum(record["tokens"] for record in group),
            "seen_ngrams": {str(n): _mean_seen(group, str(n)) for n in NGRAMS},
            "longest_repeated_suffix": max(record["repeated_suffix"] for record in group),
            "end_in_a_loop": sum(record["loop_length"] > NGRAMS[-1] for record in group),
        }
        for temperature, group in groups.items()
    ]


def _mean_seen(group: list[Record], n: str) -> float | None:
    """The mean fraction of n-grams seen before, over continuations of n tokens and more."""
    values = [record["seen_ngrams"][n] for record in group]
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def table(records: list[Record]) -> Table:
    """The table that is printed, a row for each temperature."""
    result = Table(title="Parts of continuations that repeat earlier ones")
    names = ("temperature", "tokens", *(f"seen {n}-grams" for n in NGRAMS))
    for name in (*names, "longest repeated suffix", f"end in a loop of over {NGRAMS[-1]}"):
        result.add_column(name, justify="right")
    for line in summary(records):
        seen = ["-" if x is None else f"{x:.1%}" for x in line["seen_ngrams"].values()]
        ends = f"{line['end_in_a_loop']}/{line['continuations']}"
        suffix = str(line["longest_repeated_suffix"])
        result.add_row(f"{line['temperature']:g}", str(line["tokens"]), *seen, suffix, ends)
    return result


def read_samplings(temperatures: str, top_p: float, seed: int) -> list[Sampling]:
    """A `Sampling` for each temperature of a list such as `0,0.6`."""
    try:
        numbers = [float(word) for word in temperatures.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"--temperatures {temperatures} is no list of numbers; write 0,0.6,1.")
    return [Sampling(temperature=t, top_p=top_p, seed=seed) for t in numbers]
