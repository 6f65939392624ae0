#!/usr/bin/env python
"""Converts a Hugging Face Llama 4 checkpoint to one that loads onto any mesh."""

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # copying files needs no accelerator

from _cli import byte_progress, run

from jaxmoe.checkpoint.convert import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder with config.json and safetensors")
    parser.add_argument("output", help="folder of the new checkpoint; must not exist or be empty")
    args = parser.parse_args()
    start = time.perf_counter()
    with byte_progress("Converting") as progress:
        report = convert(args.source, args.output, progress)
    seconds = time.perf_counter() - start
    left_out = f", {report.left_out} tensors left out" if report.left_out else ""
    print(
        f"Converted {report.tensors} tensors, {report.nbytes / 1e9:.2f} GB, to {args.output} "
        f"in {seconds:.1f} s ({report.nbytes / 1e9 / seconds:.2f} GB/s){left_out}."
    )


if __name__ == "__main__":
    run(main)
