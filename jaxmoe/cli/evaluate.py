"""Evaluates a checkpoint.

`logits` writes the logits of given tokens, by any path; `needle` looks for a pass key hidden in
long contexts; `loops` measures how much of its own text a model repeats; `quantized` measures what
a cache or matrices of 8 or 4 bits cost.
"""

import argparse

from jaxmoe.cli import evaluate_logits, evaluate_loops, evaluate_needle, evaluate_quantized


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (evaluate_logits, evaluate_needle, evaluate_loops, evaluate_quantized):
        module.add_parser(commands)
    args = parser.parse_args()
    args.run(args)
