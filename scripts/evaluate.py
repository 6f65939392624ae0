#!/usr/bin/env python
"""Evaluates a checkpoint.

`logits` writes the logits of given tokens, by any path; `needle` looks for a pass key hidden in
long contexts; `loops` measures how much of its own text a model repeats; `quantized` measures what
a cache or matrices of 8 or 4 bits cost.
"""

import argparse

import _evaluate_logits
import _evaluate_loops
import _evaluate_needle
import _evaluate_quantized
from _cli import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (_evaluate_logits, _evaluate_needle, _evaluate_loops, _evaluate_quantized):
        module.add_parser(commands)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run(main)
