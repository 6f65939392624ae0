"""Benchmarks, against transformers and cp on a CPU, and of kernels on a GPU.

`schedule` measures nothing: it analyzes the kernels' machine code, compiled for an absent GPU.
"""

import argparse
from collections.abc import Callable

from jaxmoe.benchmarks.attention.suite import run_attention
from jaxmoe.benchmarks.batch import add_parser as add_batch
from jaxmoe.benchmarks.convert import add_parser as add_convert
from jaxmoe.benchmarks.cpu import run_cpu
from jaxmoe.benchmarks.engine import add_parser as add_engine
from jaxmoe.benchmarks.moe.suite import run_moe
from jaxmoe.benchmarks.schedule.command import add_parser as add_schedule
from jaxmoe.benchmarks.step import add_parser as add_step
from jaxmoe.benchmarks.train import add_parser as add_train
from jaxmoe.benchmarks.vision import run_vision


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu", help="against transformers on this CPU; `make bench` runs it")
    cpu.set_defaults(start=run_cpu)
    _add_vision(commands)
    cpu.add_argument("--output", metavar="FILE.json", help="where to write the figures")
    cpu.add_argument("--prompt-tokens", type=int, default=2048)
    cpu.add_argument("--new-tokens", type=int, default=64)
    cpu.add_argument("--rounds", type=int, default=3, help="both sides, in turn")
    cpu.add_argument("--repeats", type=int, default=3, help="of each side in a round")
    add_engine(commands)
    add_batch(commands)
    add_convert(commands)
    add_schedule(commands)
    add_step(commands)
    add_train(commands)
    for name, start, subject in (
        ("attention", run_attention, "attention"),
        ("moe", run_moe, "the mixture of experts"),
    ):
        _add_suite(commands.add_parser(name, help=f"checks, then times {subject} on a GPU"), start)
    return parser


def main() -> None:
    """Runs the command."""
    args = make_parser().parse_args()
    args.start(args)


def _add_vision(commands) -> None:
    vision = commands.add_parser("vision", help="the vision tower against transformers on this CPU")
    vision.set_defaults(start=run_vision)
    vision.add_argument("--output", metavar="FILE.json", help="where to write the figures")
    vision.add_argument("--layers", type=int, default=4, help="blocks of the tower")
    vision.add_argument("--tiles", type=int, default=2)
    vision.add_argument("--rounds", type=int, default=3, help="both sides, in turn")
    vision.add_argument("--repeats", type=int, default=3, help="of each side in a round")


def _add_suite(parser: argparse.ArgumentParser, start: Callable) -> None:
    parser.set_defaults(start=start)
    parser.add_argument("--output", metavar="FILE.json", help="where to write the figures")
    parser.add_argument(
        "--cases", metavar="PATTERN", nargs="+", default=["*"], help="such as '*-int8'"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check-only", action="store_true", help="time nothing")
    only.add_argument("--time-only", action="store_true", help="check nothing")
    parser.add_argument("--force", action="store_true", help="time even what fails its check")
    parser.add_argument(
        "--simulate", action="store_true", help="only the checks, tiny, on the CPU, in plain XLA"
    )
