"""Answers files of requests, exactly once each, on one machine or on many that come and go.

All is kept in the output's folder: answers and errors in numbered parts, each written whole. Any
number of these commands, on any hosts that see the folder, share the work; killed ones lose at most
what was not yet answered, and the same command goes on.
"""

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxmoe.batch.envelope import Envelope
from jaxmoe.batch.feed import Feed
from jaxmoe.batch.formats import UnknownColumns, error_of
from jaxmoe.batch.job import Job, JobOptions
from jaxmoe.batch.leases import EXPIRY
from jaxmoe.cli import answer_flags, devices, engines, image_flags
from jaxmoe.cli.answer_flags import Setting
from jaxmoe.cli.sampling_flags import sampling_by
from jaxmoe.cli.signals import asked_to_stop
from jaxmoe.errors import Stopped, UserError
from jaxmoe.generation import jobs
from jaxmoe.generation.answers import job_digest
from jaxmoe.generation.feeding import generate_from
from jaxmoe.generation.jobs import RequestReader
from jaxmoe.generation.request_keys import check_count
from jaxmoe.images import PictureReader
from jaxmoe.processes import several
from jaxmoe.progress import byte_progress, task_progress


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="folder that jaxmoe convert wrote")
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="FILE",
        help="JSON lines (also .gz, .zst) or Parquet: a file, a folder, a pattern, or a URL with "
        "s3://, gs:// or az://; may be given again. Lines as of OpenAI's Batch API, or "
        "as of jaxmoe generate --prompts",
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="a path or URL that all commands see"
    )
    parser.add_argument(
        "--format", choices=("jsonl", "parquet"), default="jsonl", help="of the answers' files"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="answer the first N rows only")
    parser.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="take every Nth block of rows, from the Ith on",
    )
    parser.add_argument(
        "--block-rows",
        type=int,
        metavar="N",
        help="rows that a command takes at once; default: a 64th of the job, from 16 to 512, of "
        "at most 256 MiB",
    )
    parser.add_argument(
        "--lease",
        type=float,
        default=EXPIRY,
        metavar="SECONDS",
        help="without a sign of life, after which another command takes a block; default: "
        "%(default)g",
    )
    parser.add_argument(
        "--retry-errors", action="store_true", help="after the end: run the rows that failed again"
    )
    parser.add_argument(
        "--on-error",
        choices=("keep", "stop"),
        default="keep",
        help="write a failed row's error and go on, or end with it; default: %(default)s",
    )
    engines.add_flag(parser)
    image_flags.add_settings(parser)
    answer_flags.add_flags(parser)
    return parser


def main() -> None:
    """Runs the command."""
    args = make_parser().parse_args()
    answer_flags.check(args)
    options = _options(args)
    if args.engines == "each":
        engines.stand_alone()
    mesh = devices.start(args)
    setting = answer_flags.read_setting(args, sampling_by(args))
    digest = job_digest(_settings(args, setting), ())
    with asked_to_stop() as stop, _open_job(args, digest, options, stop) as job:
        if not job.done:
            _answer(args, mesh, setting, job, stop)
        _say_end(args, job)


def _options(args: argparse.Namespace) -> JobOptions:
    for flag in ("limit", "block_rows"):
        if getattr(args, flag) is not None:
            check_count(f"--{flag.replace('_', '-')}", getattr(args, flag))
    if not args.lease > 0:
        raise UserError(f"--lease {args.lease:g} is not above 0.")
    shard = _shard(args.shard)
    return JobOptions(
        args.format, args.limit, args.block_rows, shard, args.retry_errors, args.lease
    )


def _shard(text: str) -> tuple[int, int]:
    first, slash, count = text.partition("/")
    if not (slash and first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UserError(f"--shard {text!r:.40} is not I/N with I from 0 to N - 1.")
    return int(first), int(count)


def _settings(args: argparse.Namespace, setting: Setting) -> list[Any]:
    """All that the answers depend on, beside the rows."""
    own = args.format, args.limit, args.n, args.max_new_tokens, args.parse_special
    return [*setting.described(args), *own, setting.images]


@contextlib.contextmanager
def _open_job(args, digest: str, options: JobOptions, stop) -> Iterator[Job]:
    """The job; its rows are counted first, unless an earlier run has counted them."""
    with contextlib.ExitStack() as stack:
        with byte_progress("Counting rows") as progress:

            def read(done: int, total: int) -> None:
                if not several() and stop():  # several processes would have to ask together
                    raise Stopped("the rows were not counted to the end; run again.")
                progress(done, total)

            job = stack.enter_context(Job(args.output, digest, args.input, options, read))
        yield job


def _answer(args, mesh, setting: Setting, job: Job, stop) -> None:
    """Answers rows until this and other programs have answered all, or `stop` says to end."""
    config, params = devices.load(args, mesh)
    columns = UnknownColumns()
    with (
        task_progress("Generating", job.rows, "rows") as advance,
        jax.set_mesh(mesh),
    ):
        advance(job.ended)
        feed = Feed(
            job,
            functools.partial(_reader, args, setting),
            stop=stop,
            noticed=functools.partial(_warn, columns),
            ended=advance,
            ends_with_errors=args.on_error == "stop",
        )
        options = setting.options(args, params)
        stream = generate_from(config, params, feed.more, stop=feed.stops, **options)
        for record in _records(stream, setting):
            feed.take_in(record)
    if feed.failed is not None and args.on_error == "stop":
        why = error_of(feed.failed.line).rstrip(".")
        raise UserError(
            f"row {feed.failed.number} failed ({why}); correct it, or leave --on-error stop out."
        )
    if not job.done:
        raise Stopped(f"{job.ended} of {job.rows} rows are in whole parts; run again to go on.")


def _records(stream, setting: Setting) -> Iterator[dict[str, Any]]:
    return (record for _, record in jobs.finished(stream, setting.tokenizer) if record is not None)


def _reader(args, setting: Setting, folder: Path) -> RequestReader:
    pictures = PictureReader(setting.images, folder) if setting.images is not None else None
    checker = setting.checker(args.cache_tokens)
    return RequestReader(
        setting.tokenizer,
        args.max_new_tokens,
        checker.check,
        args.parse_special,
        checker.default,
        args.n,
        pictures,
    )


def _warn(columns: UnknownColumns, envelope: Envelope) -> None:
    for sentence in columns.warnings(envelope):
        print(f"[{sentence}]", file=sys.stderr)


def _say_end(args: argparse.Namespace, job: Job) -> None:
    """Says where the answers are; exits with code 65 if rows failed."""
    report = job.summarize()
    failed = report["failed"]
    print(f"{args.output} has the answers to {report['answered']} rows.", file=sys.stderr)
    if failed:
        print(
            f"{failed} rows failed: {args.output}/errors says why; --retry-errors runs them again.",
            file=sys.stderr,
        )
        sys.stderr.flush()
        raise SystemExit(os.EX_DATAERR)
