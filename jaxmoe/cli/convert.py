"""Converts a Llama 4 checkpoint, or a draft head for one, to one that loads onto any mesh.

Reads Hugging Face safetensors (bf16; FP8, INT8 and W4A16 of compressed-tensors) and Meta's
consolidated.*.pth. A run that was killed resumes when it is started again.
"""

import argparse
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # copying files needs no accelerator

from rich import box
from rich.console import Console
from rich.table import Table

from jaxmoe.checkpoint.convert import convert, verify
from jaxmoe.checkpoint.heads import convert_head, is_head
from jaxmoe.eagle_config import parse_layer_ids
from jaxmoe.errors import UserError
from jaxmoe.progress import byte_progress

WEIGHT_FORMATS = ("bf16", "float32", "fp8", "int8", "int4")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder with config.json or params.json, and the tensors")
    parser.add_argument("output", help="folder of the new checkpoint; must not exist or be empty")
    parser.add_argument(
        "--weights",
        choices=WEIGHT_FORMATS,
        help="quantize the matrices, or widen quantized ones; default: copy every byte unchanged",
    )
    parser.add_argument("--text-only", action="store_true", help="leave the vision tower out")
    parser.add_argument(
        "--ignore-unknown-config",
        action="store_true",
        help="ignore unknown keys of the configuration instead of refusing them",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read both checkpoints again and compare them; converts first if there is no output",
    )
    parser.add_argument(
        "--target",
        metavar="CHECKPOINT",
        help="of an EAGLE-3 head: the converted checkpoint that it drafts for",
    )
    parser.add_argument(
        "--layer-ids",
        metavar="ID,ID,ID",
        help="with --target: layers whose inputs the head reads; default: as its config says",
    )
    return parser


def main() -> None:
    """Runs the command."""
    args = make_parser().parse_args()
    if args.target is not None or args.layer_ids is not None or is_head(args.source):
        _convert_head(args)
        return
    there = os.path.isdir(args.output) and bool(os.listdir(args.output))
    if there and args.verify and (args.weights or args.text_only):
        raise UserError(f"{args.output} is there: --verify alone compares it as it was made.")
    if not (there and args.verify):
        _convert(args)
    if args.verify:
        start = time.perf_counter()
        with byte_progress("Verifying") as progress:
            report = verify(args.source, args.output, progress)
        _print_notes(report.notes)
        print(f"Verified {report.tensors} tensors, {_rate(report.nbytes, start)}: all are equal.")


def _convert(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    with byte_progress("Converting") as progress:
        report = convert(
            args.source,
            args.output,
            progress,
            weights=args.weights,
            text_only=args.text_only,
            ignore_unknown=args.ignore_unknown_config,
        )
    _print_notes(report.notes)
    if report.resumed == report.nbytes:
        print(f"{args.output} holds this conversion already: nothing is left to do.")
        return
    rate = _rate(report.nbytes - report.resumed, start)
    before = f", {report.resumed / 1e9:.2f} GB before" if report.resumed else ""
    left_out = f", {report.left_out} tensors left out" if report.left_out else ""
    print(f"Converted {report.tensors} tensors, {rate}{before}, to {args.output}{left_out}.")
    if report.errors:
        Console(file=sys.stdout).print(_error_table(report.errors))


def _convert_head(args: argparse.Namespace) -> None:
    """Converts a draft head.

    Raises:
        UserError: if flags do not fit together.
    """
    if args.target is None:
        raise UserError(f"{args.source} is a draft head; give --target, its model's checkpoint.")
    if args.weights or args.text_only or args.verify or args.ignore_unknown_config:
        raise UserError("--target goes with --layer-ids alone; leave the other flags out.")
    ids = None if args.layer_ids is None else parse_layer_ids(args.layer_ids)
    start = time.perf_counter()
    with byte_progress("Converting") as progress:
        report = convert_head(args.source, args.output, args.target, progress, layer_ids=ids)
    _print_notes((report.note + ".",))
    print(f"Converted {report.tensors} tensors, {_rate(report.nbytes, start)}, to {args.output}.")


def _print_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _rate(nbytes: int, start: float) -> str:
    seconds = time.perf_counter() - start
    return f"{nbytes / 1e9:.2f} GB, in {seconds:.1f} s ({nbytes / 1e9 / seconds:.2f} GB/s)"


def _error_table(errors) -> Table:
    table = Table(title="Quantized", box=box.SIMPLE, title_justify="left")
    table.add_column("kind")
    table.add_column("numbers", justify="right")
    table.add_column("relative error, rms", justify="right")
    for kind, (count, total, lost) in errors.items():
        table.add_row(kind, f"{count:,}", f"{(lost / max(total, 1e-30)) ** 0.5:.3%}")
    return table
