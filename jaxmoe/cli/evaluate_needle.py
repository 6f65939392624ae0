"""`jaxmoe evaluate needle`: is a pass key found in long contexts, and is the path exact?"""

import argparse
import dataclasses
import json
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmoe.checkpoint import store
from jaxmoe.cli import devices
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.eval import logits as evaluate
from jaxmoe.eval import needle_report
from jaxmoe.eval.needle import HAYSTACK, Needle, is_found, make_needle, random_key
from jaxmoe.files.outputs import check_writable, write_json
from jaxmoe.processes import on_first
from jaxmoe.progress import task_progress
from jaxmoe.text import Tokenizer

UNITS = {"": 1, "k": 2**10, "m": 2**20}
HAYSTACK_CHARS = 16 * 2**20  # of a file, at most: enough for millions of tokens
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One context to make and to ask about; depths in parts of the context, from 0 to 1."""

    length: int
    depth: tuple[float, float]  # the needle lies somewhere between these
    trial: int


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand and its flags."""
    parser = commands.add_parser("needle", help="a pass key hidden in long contexts")
    parser.add_argument("checkpoint", help="folder that jaxmoe convert wrote")
    parser.add_argument(
        "--lengths", default="1k,2k,4k,8k", metavar="N,...", help="tokens, as in 8k,1m (k: 1024)"
    )
    parser.add_argument(
        "--depths",
        default="10",
        metavar="N | P,P,...",
        help="a needle somewhere in each of N equal parts, or at these percentages",
    )
    parser.add_argument("--trials", type=int, default=1, metavar="N", help="for each cell")
    parser.add_argument("--digits", type=int, default=5, metavar="N", help="of the pass key")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--haystack", metavar="FILE", help="text to hide it in; default: our own")
    parser.add_argument(
        "--prefill-chunk",
        "--segment",
        type=int,
        default=evaluate.PREFILL_CHUNK,
        metavar="N",
        help="prompt tokens that one step takes, at most",
    )
    parser.add_argument(
        "--check-exact",
        action="store_true",
        help="compare with one whole forward pass over the same tokens",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="every trial, and the summary; trials that it holds already are not run again",
    )
    parser.add_argument("--png", metavar="FILE", help="a heat map")
    devices.add_flags(parser)
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> None:
    """Runs the command."""
    _check_flags(args)
    cases = make_cases(read_lengths(args.lengths), read_depths(args.depths), args.trials)
    mesh = devices.start(args)
    for path in filter(None, (args.json, args.png)):
        check_writable(path)
    tokenizer = devices.required_tokenizer(args.checkpoint)
    needles = make_needles(cases, tokenizer, args)
    check_fit(store.read_config(args.checkpoint, text_only=True), cases, args.checkpoint)
    records = on_first(lambda: known_trials(args.json, cases, needles)) if args.json else []
    left = [pair for pair in zip(cases, needles, strict=True) if not _is_known(records, *pair)]
    config, params = devices.load(args, mesh, text_only=True)
    with jax.set_mesh(mesh):
        for record in run_cases(config, params, tokenizer, left, args):
            records.append(record)
            if args.json:  # after each: a long run that is stopped has told what it saw
                write_json(args.json, report(args, records))
    records.sort(key=lambda record: (record["length"], record["depth"], record["trial"]))
    if args.json:
        write_json(args.json, report(args, records))
    needle_report.show(needle_report.table(records))
    if args.png:
        on_first(lambda: needle_report.write_png(args.png, records))


def run_cases(
    config: Llama4Config,
    params: dict,
    tokenizer: Tokenizer,
    cases: list[tuple[Case, Needle]],
    args: argparse.Namespace,
) -> Iterator[Record]:
    """Asks for every needle; yields what came of each."""
    total = sum(case.length for case, _ in cases)
    stop_ids = {*config.eos_token_ids, *tokenizer.stop_ids}
    with task_progress("Needles", total, "tokens") as advance:
        for case, needle in cases:
            start = time.perf_counter()
            answer = evaluate.greedy_answer(
                config,
                params,
                needle.prompt,
                needle.room,
                prefill_chunk=args.prefill_chunk,
                stop_ids=tuple(stop_ids),
                report=advance,
            )
            record = _record(case, needle, tokenizer.decode(answer.tokens))
            record["seconds"] = round(time.perf_counter() - start, 2)
            record["host_peak_bytes"] = host_peak_bytes()  # of this process so far
            if args.check_exact:
                record |= exactness(config, params, needle, answer)
            advance(needle.room + 1 - len(answer.tokens))
            yield record


def exactness(
    config: Llama4Config, params: dict, needle: Needle, answer: evaluate.Answer
) -> Record:
    """The cached path beside one whole forward pass over the same tokens."""
    tokens = (*needle.prompt, *answer.tokens[:-1])
    logits = evaluate.last_logits(config, params, tokens, len(answer.tokens))
    return {
        "max_logit_difference": float(np.abs(logits - answer.logits).max()),
        "same_greedy": logits.argmax(-1).tolist() == list(answer.tokens),
    }


def _record(case: Case, needle: Needle, answer: str) -> Record:
    return {
        "length": case.length,
        "depth": list(case.depth),
        "trial": case.trial,
        "needle_at": needle.start,
        "key": needle.key,
        "answer": answer,
        "found": is_found(needle.key, answer),
    }


def host_peak_bytes() -> int:
    """The most memory that this process has had."""
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def report(args: argparse.Namespace, records: list[Record]) -> Record:
    """The content of the JSON file: the run, its device, a summary and every trial."""
    run = {"seed": args.seed, "segment": args.prefill_chunk}
    run |= {name: getattr(args, name) for name in ("haystack", "mesh", "dtype")}
    return {
        "run": {"checkpoint": os.path.basename(os.path.abspath(args.checkpoint)), **run},
        "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "summary": needle_report.summary(records),
        "trials": records,
    }


def known_trials(path: str, cases: list[Case], needles: list[Needle]) -> list[Record]:
    """The trials of an earlier run's file; none if there is no file.

    Raises:
        UserError: if the file is another one, or its trials had other needles.
    """
    if not os.path.exists(path):
        return []
    try:
        records = json.loads(Path(path).read_text())["trials"]
        keys = {_cell(record): record["key"] for record in records}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of an earlier run ({error!r}); delete it.") from None
    for case, needle in zip(cases, needles, strict=True):
        if keys.get(_cell(_record(case, needle, "")), needle.key) != needle.key:
            raise UserError(f"{path} holds a run of another seed or of other keys; delete it.")
    return records


def _cell(record: Record) -> tuple:
    return record["length"], *record["depth"], record["trial"]


def _is_known(records: list[Record], case: Case, needle: Needle) -> bool:
    return _cell(_record(case, needle, "")) in map(_cell, records)


def make_cases(lengths: list[int], depths: list[tuple[float, float]], trials: int) -> list[Case]:
    """The cases of a run: all trials at all depths of all lengths."""
    return [Case(n, depth, trial) for n in lengths for depth in depths for trial in range(trials)]


def make_needles(cases: list[Case], tokenizer: Tokenizer, args: argparse.Namespace) -> list[Needle]:
    """The contexts; each follows from the seed and its own case, whatever the other cases are."""
    haystack = np.array(tokenizer.encode(_read_haystack(args.haystack)))
    needles = []
    for case in cases:
        low, high = case.depth
        rng = np.random.default_rng((args.seed, case.length, int(low * 10**6), case.trial))
        key, depth = random_key(rng, args.digits), rng.uniform(low, high)
        turned = np.roll(haystack, rng.integers(len(haystack)))  # other words by each question
        needles.append(make_needle(tokenizer, turned, key, case.length, depth))
    return needles


def _read_haystack(path: str | None) -> str:
    if path is None:
        return HAYSTACK
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(HAYSTACK_CHARS)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}.") from None
    if not text.strip():
        raise UserError(f"{path} holds no text; give a haystack with some.")
    return " " + " ".join(text.split())


def check_fit(config: Llama4Config, cases: list[Case], checkpoint: str) -> None:
    """Raises a UserError if a context is longer than the model's."""
    longest = max(case.length for case in cases)
    if longest > config.max_position_embeddings:
        raise UserError(
            f"--lengths asks for {longest} tokens, but {checkpoint} has a context of "
            f"{config.max_position_embeddings}; ask for fewer."
        )


def read_lengths(text: str) -> list[int]:
    """Token counts from text such as `1k,8192`."""
    found = [re.fullmatch(r"(\d+)([km]?)", word.strip().lower()) for word in text.split(",")]
    lengths = [int(match[1]) * UNITS[match[2]] for match in found if match]
    if len(lengths) < len(found) or 0 in lengths:
        raise UserError(f"--lengths {text} is no list of token counts; write 1k,8k or 1024,8192.")
    return lengths


def read_depths(text: str) -> list[tuple[float, float]]:
    """Bounds of each part of the context: `10` is every tenth, `0,50,100` three places."""
    words = text.split(",")
    if not all(re.fullmatch(r"\d+(\.\d+)?", word.strip()) for word in words):
        raise UserError(f"--depths {text} is neither a count nor percentages; write 10 or 0,50.")
    numbers = [float(word) for word in words]
    if len(words) > 1:
        if max(numbers) > 100:
            raise UserError(f"--depths {text} holds a percentage above 100.")
        return [(number / 100, number / 100) for number in numbers]
    count = int(numbers[0])
    if count < 1:
        raise UserError(f"--depths {text} is below 1.")
    return [(i / count, (i + 1) / count) for i in range(count)]


def _check_flags(args: argparse.Namespace) -> None:
    for name, least in (("trials", 1), ("digits", 1), ("prefill_chunk", 1), ("seed", 0)):
        if getattr(args, name) < least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(args, name)} is below {least}.")
