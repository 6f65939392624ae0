"""Turns text into the token file that training reads (docs/training.md)."""

import argparse
import itertools
import sys

from jaxmoe.cli import devices
from jaxmoe.files.outputs import check_writable
from jaxmoe.train.make_tokens import documents, save_tokens, tokens_of


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder with the tokenizer")
    parser.add_argument(
        "inputs",
        metavar="IN",
        nargs="+",
        help='.jsonl files have a document on each line, {"text": ...}; other files are one each',
    )
    parser.add_argument("--output", required=True, metavar="TOKENS.npy")
    return parser


def main() -> None:
    """Runs the command."""
    args = make_parser().parse_args()
    check_writable(args.output, empty=True)
    tokenizer = devices.required_tokenizer(args.checkpoint)
    texts = itertools.chain.from_iterable(map(documents, args.inputs))
    tokens = tokens_of(texts, tokenizer)
    save_tokens(args.output, tokens)
    count = int((tokens == tokenizer.bos_id).sum())
    aside = sys.stderr if args.output == "-" else sys.stdout
    print(f"Wrote {len(tokens):,} tokens of {count:,} document(s) to {args.output}.", file=aside)
