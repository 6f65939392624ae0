"""Generates text from a checkpoint, for one prompt on the terminal or for a file of requests."""

import argparse
import contextlib
import sys
import time

import jax

from jaxmoe import processes
from jaxmoe.cli import answer_flags, devices, image_flags, sampling_flags
from jaxmoe.cli.signals import asked_to_stop
from jaxmoe.errors import Stopped, UserError
from jaxmoe.generation import jobs
from jaxmoe.generation.answers import Answers, job_digest
from jaxmoe.generation.completion import Completion
from jaxmoe.generation.engine import generate
from jaxmoe.generation.request import Request, expand
from jaxmoe.generation.request_keys import check_samples
from jaxmoe.generation.saved_document import document_adapter, document_length, load_document_for
from jaxmoe.generation_config import FILE, read_generation_config
from jaxmoe.progress import byte_progress, task_progress


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="folder that jaxmoe convert wrote")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT")
    parser.add_argument("--chat", action="store_true", help="--prompt is a user's turn of a chat")
    source.add_argument("--prompts", metavar="FILE.jsonl", help="one request a line; -: stdin")
    parser.add_argument(
        "--output",
        metavar="FILE.jsonl",
        help="answers in the order of the requests; a killed run resumes when started again",
    )
    image_flags.add_flags(parser)
    answer_flags.add_flags(parser)
    parser.add_argument(
        "--document",
        metavar="FOLDER",
        help="folder that jaxmoe read wrote; every request follows its text",
    )
    return parser


def main() -> None:
    """Runs the command."""
    args = make_parser().parse_args()
    answer_flags.check(args)
    sampling_flags.check_written(args)
    if args.chat and (args.prompt is None or args.parse_special):
        raise UserError("--chat goes with --prompt, and without --parse-special.")
    if args.image and args.prompt is None:
        raise UserError('--image goes with --prompt; lines of --prompts have a key "images".')
    if args.document and (args.kv or args.cache_tokens is not None):
        raise UserError("--document brings its own cache; leave --kv and --cache-tokens out.")
    mesh = devices.start(args)
    if args.prompts == "-" and processes.several():
        raise UserError("--prompts - is the input of one process; give several a file.")
    setting = answer_flags.read_setting(args, sampling_flags.sampling_by(args))
    if setting.adapters and args.prompt is not None:
        raise UserError("--prompt takes one --adapter FOLDER; lines of --prompts choose by name.")
    tokenizer = setting.tokenizer
    after = document_length(args.document) if args.document else 0
    of_document = document_adapter(args.document) if args.document else None

    document = {"after": after, "document_adapter": of_document}
    lines = _requests(
        args, tokenizer, setting.checker(args.cache_tokens, **document), setting.images
    )
    with _answers(args, setting, lines) as answers, asked_to_stop() as stop:
        left = _left(lines, answers)
        if not left:
            return
        for name in read_generation_config(args.checkpoint).unsupported:
            print(f"[{FILE} has {name}, which is not supported]", file=sys.stderr)
        text_only = not any(request.pictures for request in left)
        config, params = devices.load(args, mesh, text_only)
        with jax.set_mesh(mesh):
            options = setting.options(args, params)
            options["document"] = _document(args, config, params, left) if after else None
            stream = generate(config, params, left, setting.sampling, stop=stop, **options)
            show = _show_progress if args.prompt is None else _stream_text
            if args.prompt is not None and len(lines) > 1:
                show = _print_texts
            failed = count = 0
            for record in show(stream, left, tokenizer, args):
                failed, count = failed + ("error" in record), count + 1
                if answers is not None:
                    answers.write(record)
        if count < len(left):
            kept = "their answers are kept; " if answers is not None else ""
            raise Stopped(f"{count} of {len(left)} requests were answered; {kept}run again.")
    if failed:
        print(f"{failed} of {len(left)} requests ended with an error.", file=sys.stderr)


def _requests(args, tokenizer, checker, images) -> list[Request | jobs.Refusal]:
    if args.prompts is not None:
        return jobs.read_requests(
            args.prompts,
            tokenizer,
            args.max_new_tokens,
            checker.check,
            args.parse_special,
            checker.default,
            args.n,
            images,
        )
    if tokenizer is None:
        raise UserError(f"{args.checkpoint} has no tokenizer; use --prompts with tokens.")
    tokens, pictures = image_flags.prompt_by(args, tokenizer, images)
    check_samples(args.n, checker.default)
    request = Request("0", tuple(tokens), args.max_new_tokens, pictures=pictures)
    return [*expand(checker.check(request), args.n)]


def _answers(args, setting, lines) -> contextlib.AbstractContextManager[Answers | None]:
    """The file or standard output that answers are written to as JSON lines.

    Without --output, a --prompt writes none: its answer goes to the terminal as text.
    """
    output = args.output or (None if args.prompts is None else "-")
    if output is None:
        return contextlib.nullcontext()
    digest = job_digest(setting.described(args, args.document), lines)
    return Answers(output, digest, lines)


def _left(lines, answers: Answers | None) -> list[Request]:
    """The requests that have no answer yet; prints the counts of the others to stderr."""
    requests = [line for line in lines if isinstance(line, Request)]
    refused = [line for line in lines if not isinstance(line, Request)]
    if answers is not None and answers.complete:
        print(f"{answers.path} has all answers already.", file=sys.stderr)
        return []
    if refused:
        print(
            f"{len(refused)} of {len(lines)} lines are refused: {refused[0].error}", file=sys.stderr
        )
    if answers is None or not answers.done:
        return requests
    left = [request for request in requests if str(request.id) not in answers.done]
    print(f"{len(requests) - len(left)} of {len(requests)} were answered before.", file=sys.stderr)
    return left


def _document(args, config, params, requests):
    with byte_progress("Loading the document") as progress:
        given = config, params, requests, args.rows, progress
        return load_document_for(args.document, *given)


def _stream_text(stream, requests, tokenizer, args):
    """Prints an answer to stdout as it is generated, its prompt and a summary to stderr.

    Yields the answer's record.
    """
    times = []
    for token, record in jobs.finished(stream, tokenizer):
        if not times:  # printed only now, so that it does not precede a long compilation
            print(args.prompt, end="\n" if args.chat else "", file=sys.stderr, flush=True)
        times.append(time.perf_counter())
        print(token.text, end="", flush=True)
        if record is not None:
            print()
            if "error" in record:
                raise UserError(record["error"])
            _print_notes(record)
            drafts = _drafts(token.completion)
            print(f"[{_summary(times)}{drafts}, {token.finish_reason}]", file=sys.stderr)
            yield record


def _print_texts(stream, requests, tokenizer, args):
    """Prints several answers to stdout, each whole and once those before it are printed.

    Yields their records as they end.
    """
    ended, left = {}, [request.id for request in requests]
    print(args.prompt, file=sys.stderr)
    for _, record in jobs.finished(stream, tokenizer):
        if record is None:
            continue
        ended[record["id"]] = record
        while left and left[0] in ended:
            _print_text(ended.pop(left.pop(0)))
        yield record


def _print_text(record) -> None:
    print(record["text"], flush=True)
    _print_notes(record)
    count, reason = record["usage"]["completion_tokens"], record["finish_reason"]
    print(f"[{record['id']}: {count} tokens, {reason}]", file=sys.stderr)


def _print_notes(record) -> None:
    for key in ("warning", "error"):
        if key in record:
            print(f"[{record[key]}]", file=sys.stderr)


def _summary(times: list[float]) -> str:
    """The number of tokens, and their rate after both prefill and decoding were compiled."""
    compiled = times[1:]
    if len(compiled) < 2:
        return f"{len(times)} tokens"
    return f"{len(times)} tokens, {(len(compiled) - 1) / (compiled[-1] - compiled[0]):.1f} tokens/s"


def _drafts(completion: Completion) -> str:
    """How many drafts were right, and how many tokens a step wrote; nothing without drafts."""
    if not completion.drafted:
        return ""
    tried, right = sum(completion.drafted), sum(completion.accepted)
    each = completion.count / (completion.count - right)
    shares = zip(completion.accepted, completion.drafted, strict=True)
    by_place = ", ".join(f"{one / all_:.0%}" for one, all_ in shares)
    return f", {each:.1f} a step, {right} of {tried} drafts right (by place: {by_place})"


def _show_progress(stream, requests, tokenizer, args):
    """Yields the records of answers, and shows a progress bar over the tokens asked for.

    An answer that stops early completes its share of the bar.
    """
    budget = sum(request.max_new_tokens for request in requests)
    on_stdout = args.output in (None, "-")
    with task_progress("Generating", budget, "tokens", stdout_in_use=on_stdout) as advance:
        for token, record in jobs.finished(stream, tokenizer):
            advance(1)
            if record is not None:
                advance(token.request.max_new_tokens - len(record["tokens"]))
                yield record
