"""`jaxmoe evaluate drafts`: how many of a head's guesses its target accepts."""

import argparse
import dataclasses
import sys

import jax
from rich.table import Table

from jaxmoe.checkpoint.heads import load_head
from jaxmoe.cli import devices
from jaxmoe.cli.evaluate_loops import read_samplings
from jaxmoe.cli.evaluate_quantized import read_rows
from jaxmoe.eagle_config import check_target, parse_layer_ids
from jaxmoe.eval import needle_report
from jaxmoe.eval.drafts import Acceptance, figures, measure, warning_of
from jaxmoe.files.outputs import check_writable, write_json
from jaxmoe.generation.request_keys import check_count


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand and its flags."""
    parser = commands.add_parser("drafts", help="how many guesses of a draft head are accepted")
    parser.add_argument("checkpoint", help="folder that jaxmoe convert wrote")
    parser.add_argument("head", help="folder that jaxmoe convert --target wrote")
    parser.add_argument(
        "--text", metavar="FILE", required=True, help="to measure on; not of the head's training"
    )
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="of text")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a row")
    parser.add_argument("--count", type=int, default=5, metavar="N", help="tokens of a chain")
    parser.add_argument(
        "--temperatures", default="0,1", metavar="T,...", help="0: greedy; default: 0,1"
    )
    parser.add_argument(
        "--layer-ids", metavar="ID,ID,ID", help="layers whose inputs it reads; default: its own"
    )
    parser.add_argument("--json", metavar="FILE", help="where to write the figures")
    devices.add_flags(parser)
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> None:
    """Runs the command."""
    for name in ("rows", "length", "count"):
        check_count(f"--{name}", getattr(args, name))
    temperatures = [one.temperature for one in read_samplings(args.temperatures, 1.0, 0)]
    mesh = devices.start(args)
    if args.json:
        check_writable(args.json)
    tokenizer = devices.required_tokenizer(args.checkpoint)
    tokens = read_rows(args.text, tokenizer, args.rows, args.length)
    config, params = devices.load(args, mesh, text_only=True)
    head = load_head(args.head, mesh, config, params["embed"].dtype)
    if args.layer_ids is not None:
        ids = parse_layer_ids(args.layer_ids)
        head = head._replace(config=dataclasses.replace(head.config, layer_ids=ids))
        check_target(head.config, config, "--layer-ids")
    with jax.set_mesh(mesh):
        found = measure(config, params, head, tokens, temperatures, args.count)
        warning = warning_of(config, params, head, tokens, found)
    if args.json:
        write_json(args.json, {"drafts": figures(found)})
    needle_report.show(table(found))
    if warning is not None:
        print(f"warning: {warning}.", file=sys.stderr)


def table(found: list[Acceptance]) -> Table:
    """A row for each temperature."""
    shown = Table(title=f"Guesses that are accepted, of {found[0].chains:,} chains")
    for name in ("temperature", *(f"first {n}" for n in range(1, len(found[0].accepted) + 1))):
        shown.add_column(name, justify="right")
    shown.add_column("tokens a step", justify="right")
    for one in found:
        shares = (f"{share:.1%}" for share in one.accepted)
        shown.add_row(f"{one.temperature:g}", *shares, f"{one.tokens_per_step:.2f}")
    return shown
