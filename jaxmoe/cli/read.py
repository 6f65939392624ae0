"""Prefills a long text once and saves its KV cache, for `jaxmoe generate --document`.

A run that was interrupted resumes when it is started again.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.zarr.manifest import is_finished
from jaxmoe.cli import devices
from jaxmoe.errors import UserError
from jaxmoe.files.workspace import workspace_path
from jaxmoe.generation import document, saved_document
from jaxmoe.model.kv_cache import KV_FORMATS
from jaxmoe.parsing import MAX_TEXT_BYTES, read_text
from jaxmoe.progress import task_progress


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="folder that jaxmoe convert wrote")
    parser.add_argument("text", help="file of text, in UTF-8")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="must not exist or be empty"
    )
    parser.add_argument("--kv", choices=KV_FORMATS, help="how keys and values are stored")
    parser.add_argument(
        "--prefill-chunk",
        "--segment",
        type=int,
        default=document.PREFILL_CHUNK,
        metavar="N",
        help="tokens that one step takes, at most",
    )
    parser.add_argument(
        "--save-every",
        type=int,
        default=saved_document.INTERVAL,
        metavar="N",
        help="tokens between two saves, rounded up to whole chunks; default: %(default)s",
    )
    devices.add_flags(parser)
    return parser.parse_args()


def main() -> None:
    """Runs the command."""
    args = parse_args()
    for flag in ("prefill_chunk", "save_every"):
        if getattr(args, flag) < 1:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} {getattr(args, flag)} is below 1.")
    mesh = devices.start(args)
    tokens = _tokens(args)
    document.check_length(store.read_config(args.checkpoint), len(tokens))
    if not is_finished(args.output):
        workspace_path(Path(args.output))  # raises for an unusable folder before the model loads
    config, params = devices.load(args, mesh)
    with jax.set_mesh(mesh), task_progress("Reading", len(tokens), "tokens") as advance:
        counts = saved_document.read_document(
            config,
            params,
            tokens,
            args.output,
            kv=args.kv,
            prefill_chunk=args.prefill_chunk,
            interval=args.save_every,
        )
        done = saved = next(counts)
        advance(saved)
        start = time.perf_counter()
        for count in counts:
            advance(count - done)
            done = count
    if done == saved:
        print(f"{args.output} holds this text already: nothing is left to do.", file=sys.stderr)
        return
    rate = (done - saved) / (time.perf_counter() - start)
    before = f", {saved} of them before" if saved else ""
    print(f"Read {done} tokens{before}, {rate:.0f} tokens/s, to {args.output}.", file=sys.stderr)


def _tokens(args: argparse.Namespace) -> np.ndarray:
    tokenizer = devices.tokenizer(args.checkpoint)
    if tokenizer is None:
        raise UserError(f"{args.checkpoint} has no tokenizer; convert the model with its own.")
    text = read_text(args.text, MAX_TEXT_BYTES)
    if not text.strip():
        raise UserError(f"{args.text} is empty; give it some text.")
    return np.asarray(tokenizer.encode(text, bos=True), np.int32)
