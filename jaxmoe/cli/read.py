"""Prefills a long text or pages as pictures once and saves the KV cache.

`jaxmoe generate --document` asks about it.

A run that was interrupted resumes when it is started again.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.peft import adapter_digest
from jaxmoe.checkpoint.zarr.manifest import is_finished
from jaxmoe.cli import devices, image_flags
from jaxmoe.cli.signals import asked_to_stop
from jaxmoe.config import Llama4Config
from jaxmoe.errors import Stopped, UserError
from jaxmoe.files.workspace import workspace_path
from jaxmoe.generation import document, saved_document
from jaxmoe.images import PictureReader
from jaxmoe.model.kv_cache import KV_FORMATS
from jaxmoe.parsing import MAX_TEXT_BYTES, read_text
from jaxmoe.processes import on_first
from jaxmoe.progress import task_progress
from jaxmoe.text import Prompt, text_prompt

PAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif")  # suffixes of pictures in a folder


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="folder that jaxmoe convert wrote")
    parser.add_argument(
        "text", help="file of text, in UTF-8, or folder of pictures, read in the order of names"
    )
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
    image_flags.add_settings(parser)
    devices.add_flags(parser)
    return parser


def main() -> None:
    """Runs the command."""
    args = make_parser().parse_args()
    for flag in ("prefill_chunk", "save_every"):
        if getattr(args, flag) < 1:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} {getattr(args, flag)} is below 1.")
    mesh = devices.start(args)
    model = store.read_config(args.checkpoint)
    tokens, pictures = _prompt(args, model)
    document.check_length(model, len(tokens))
    on_first(lambda: _check_output(args.output))
    config, params = devices.load(args, mesh, text_only=not pictures)
    bar = task_progress("Reading", len(tokens), "tokens")
    with jax.set_mesh(mesh), asked_to_stop() as stop, bar as advance:
        counts = saved_document.read_document(
            config,
            params,
            np.asarray(tokens, np.int32),
            args.output,
            kv=args.kv,
            prefill_chunk=args.prefill_chunk,
            interval=args.save_every,
            pictures=pictures,
            stop=stop,
            adapter=adapter_digest(args.adapter) if args.adapter else None,
        )
        done = saved = next(counts)
        advance(saved)
        start = time.perf_counter()
        for count in counts:
            advance(count - done)
            done = count
    if done < len(tokens):
        raise Stopped(
            f"{done} of {len(tokens)} tokens were read, and what is saved is kept; run again."
        )
    if done == saved:
        print(f"{args.output} holds this text already: nothing is left to do.", file=sys.stderr)
        return
    rate = (done - saved) / (time.perf_counter() - start)
    before = f", {saved} of them before" if saved else ""
    print(f"Read {done} tokens{before}, {rate:.0f} tokens/s, to {args.output}.", file=sys.stderr)


def _check_output(output: str) -> None:
    """Raises a UserError for an unusable folder, before the model loads."""
    if not is_finished(output):
        workspace_path(Path(output))


def _prompt(args: argparse.Namespace, config: Llama4Config) -> Prompt:
    tokenizer = devices.required_tokenizer(args.checkpoint)
    settings = image_flags.settings_by(args, config)
    if Path(args.text).is_dir():
        pages = [path for path in sorted(Path(args.text).iterdir()) if path.suffix.lower() in PAGES]
        if not pages:
            raise UserError(f"{args.text} holds no pictures ({', '.join(PAGES)}); put pages there.")
        reader = PictureReader(settings) if settings is not None else None
        return text_prompt([""] * (len(pages) + 1), tokenizer, reader, list(map(str, pages)))
    text = read_text(args.text, MAX_TEXT_BYTES)
    if not text.strip():
        raise UserError(f"{args.text} is empty; give it some text.")
    return Prompt(tokenizer.encode(text, bos=True))
