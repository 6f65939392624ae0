#!/usr/bin/env python
"""Generates text from a checkpoint: one prompt to the terminal, or many as JSON lines."""

import argparse
import contextlib
import dataclasses
import json
import sys
import time

import _devices
import jax
from _cli import byte_progress, run, task_progress

from jaxmoe.checkpoint import store
from jaxmoe.errors import UserError
from jaxmoe.generate import jobs
from jaxmoe.generate.engine import Request, fit_context, generate
from jaxmoe.generate.sampling import Sampling
from jaxmoe.generate.saved_document import document_length, load_document
from jaxmoe.model.cache import FORMATS
from jaxmoe.text import StreamDecoder


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="folder that convert.py wrote")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--prompts", metavar="FILE.jsonl")
    parser.add_argument("--output", metavar="FILE.jsonl")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.6, metavar="T", help="0: greedy")
    parser.add_argument("--top-p", type=float, default=0.9, metavar="P")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0: all")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument(
        "--rows", type=int, default=8, metavar="N", help="requests at once, at most"
    )
    parser.add_argument("--kv", choices=FORMATS, help="how the cache stores keys and values")
    parser.add_argument(
        "--cache-tokens", type=int, metavar="N", help="of all rows together; requests wait for room"
    )
    parser.add_argument(
        "--document", metavar="FOLDER", help="that read.py wrote; each request comes after its text"
    )
    _devices.add_flags(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.document and (args.kv or args.cache_tokens is not None):
        raise UserError("--document brings its own cache; leave --kv and --cache-tokens out.")
    mesh = _devices.start(args)
    sampling = Sampling(
        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, seed=args.seed
    )
    tokenizer = _devices.tokenizer(args.checkpoint)
    requests = _requests(args, tokenizer)
    model = store.read_config(args.checkpoint)
    after = document_length(args.document) if args.document else 0
    if after:
        requests = [_without_begin(request, tokenizer) for request in requests]
    requests = [fit_context(model, request, after) for request in requests]
    stop_ids = {*model.eos_token_ids, *(tokenizer.stop_ids if tokenizer else ())}
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(jobs.output_file(args.output)) if args.output else None
        config, params = _devices.load(args, mesh)
        stack.enter_context(jax.set_mesh(mesh))
        document = _document(args, config, params, requests) if after else None
        stream = generate(
            config,
            params,
            requests,
            sampling,
            rows=args.rows,
            stop_ids=tuple(stop_ids),
            kv=args.kv,
            cache_tokens=args.cache_tokens,
            document=document,
        )
        show = _stream_text if args.prompt is not None else _show_progress
        for record in show(jobs.finished(stream, tokenizer), requests, tokenizer, args):
            if output is not None or args.prompts is not None:
                print(json.dumps(record, ensure_ascii=False), file=output, flush=True)


def _requests(args, tokenizer):
    if args.prompts is not None:
        return jobs.read_requests(args.prompts, tokenizer, args.max_new_tokens)
    if tokenizer is None:
        raise UserError(f"{args.checkpoint} has no tokenizer; use --prompts with tokens.")
    tokens = tuple(tokenizer.encode(args.prompt, bos=True))
    return [Request("0", tokens, args.max_new_tokens)]


def _without_begin(request: Request, tokenizer) -> Request:
    """A request that goes on with a document, which has the begin-of-text token."""
    if tokenizer is None or request.tokens[:1] != (tokenizer.bos_id,):
        return request
    return dataclasses.replace(request, tokens=request.tokens[1:])


def _document(args, config, params, requests):
    room = max(request.length for request in requests)
    with byte_progress("Loading the document") as progress:
        return load_document(args.document, config, params, room, progress)


def _stream_text(stream, requests, tokenizer, args):
    """Prints text as it comes: the prompt and the closing line on stderr, the answer on stdout."""
    print(args.prompt, end="", file=sys.stderr, flush=True)
    decoder, first, count = StreamDecoder(tokenizer), None, 0
    for token, record in stream:
        first, count = first or time.perf_counter(), count + 1
        print(decoder.push(token.token), end="", flush=True)
        if record is not None:
            print(decoder.flush())
            rate = (count - 1) / max(time.perf_counter() - first, 1e-9)
            print(f"[{count} tokens, {rate:.1f} tokens/s, {token.finish_reason}]", file=sys.stderr)
            yield record


def _show_progress(stream, requests, tokenizer, args):
    """A bar over the tokens asked for; a request that stops early completes its share."""
    budget = sum(request.max_new_tokens for request in requests)
    with task_progress("Generating", budget, "tokens") as advance:
        for token, record in stream:
            advance(1)
            if record is not None:
                advance(token.request.max_new_tokens - len(record["tokens"]))
                yield record


if __name__ == "__main__":
    run(main)
