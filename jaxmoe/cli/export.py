"""Writes a checkpoint back in the Hugging Face layout."""

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # copying files needs no accelerator

from jaxmoe.checkpoint.export import export
from jaxmoe.progress import byte_progress


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="folder that jaxmoe convert or jaxmoe train made")
    parser.add_argument("output", help="folder of the model; must not exist or be empty")
    parser.add_argument(
        "--weights", choices=("bf16", "float32"), help="widen quantized matrices to this"
    )
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="add an adapter that PEFT or jaxmoe train saved"
    )
    parser.add_argument(
        "--drop-selection-bias",
        action="store_true",
        help="leave out the biases by which routers choose experts, which the layout cannot have",
    )
    return parser


def main() -> None:
    """Runs the command."""
    args = make_parser().parse_args()
    start = time.perf_counter()
    with byte_progress("Exporting") as progress:
        report = export(
            args.checkpoint,
            args.output,
            progress,
            weights=args.weights,
            adapter=args.adapter,
            drop_selection_bias=args.drop_selection_bias,
        )
    seconds = time.perf_counter() - start
    print(
        f"Exported {report.tensors} tensors, {report.nbytes / 1e9:.2f} GB, to {args.output} "
        f"in {seconds:.1f} s ({report.nbytes / 1e9 / seconds:.2f} GB/s)."
    )
    for note in report.notes:
        print(note)
