"""Evaluates a checkpoint.

`logits` writes the logits of given tokens, by any path; `needle` looks for a pass key hidden in
long contexts; `answers` grades answers to questions, with or without pictures; `loops` measures how
much of its own text a model repeats; `quantized` measures what a cache or matrices of 8 or 4 bits
cost; `drafts` counts the guesses of a draft head that its target accepts.
"""

import argparse

from jaxmoe.cli import (
    evaluate_answers,
    evaluate_drafts,
    evaluate_logits,
    evaluate_loops,
    evaluate_needle,
    evaluate_quantized,
)

COMMANDS = (
    evaluate_logits,
    evaluate_needle,
    evaluate_answers,
    evaluate_loops,
    evaluate_quantized,
    evaluate_drafts,
)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for module in COMMANDS:
        module.add_parser(commands)
    return parser


def main() -> None:
    """Runs the command."""
    args = make_parser().parse_args()
    args.run(args)
