"""The `jaxmoe` command and its subcommands."""

import argparse
import importlib
import sys
from typing import Any

from jaxmoe.cli.launch import is_spare
from jaxmoe.cli.terminal import run

COMMANDS = {
    "convert": "any published Llama 4 checkpoint to an Orbax one",
    "generate": "text from a checkpoint, for a prompt or a file of requests",
    "batch": "files of requests to files of answers, exactly once, on any number of hosts",
    "read": "a long text into a saved KV cache, for any number of questions",
    "evaluate": "logits, needles in long contexts, repetition, quantization",
    "export": "a checkpoint back to the Hugging Face layout",
    "make-tokens": "text or JSON lines to the tokens that training reads",
    "train": "a model as one YAML file says",
    "plan": "what fits on hardware before it is rented",
    "benchmark": "speed, and what bounds each kernel by its machine code",
    "tune": "the sizes of the GPU kernels",
    "doctor": "what each process sees, and how fast the devices reach each other",
    "run": "any of these, as a YAML file says",
}


ALONE = ("convert", "export", "make-tokens", "plan", "benchmark", "tune")  # one process does them


def main() -> None:
    """Runs the subcommand that the first argument names; it parses the other arguments itself."""
    lines = "\n".join(f"  {name:<12} {summary}" for name, summary in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="jaxmoe",
        description="Llama 4 in JAX: `jaxmoe COMMAND --help` says more of each command.",
        epilog=f"commands:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("--version", action="version", version=_version())
    command = parser.parse_args(sys.argv[1:2]).command
    run_command(command, sys.argv[2:], prog=f"jaxmoe {command}")


def run_command(name: str, arguments: list[str], prog: str) -> None:
    """Runs a command with its own argument list, and exits the process on errors.

    Args:
        name: one of COMMANDS.
        arguments: what the command parses.
        prog: the program's name in its usage text.
    """
    run(lambda: start_command(name, arguments, prog))


def start_command(name: str, arguments: list[str], prog: str) -> None:
    """Runs a command, whose errors are raised; arguments are those of `run_command`.

    Where a scheduler starts several processes, the first one alone runs a command of `ALONE`.
    """
    sys.argv = [prog, *arguments]
    if name not in ALONE or not is_spare():
        command_module(name).main()


def command_module(name: str) -> Any:
    """The module of a command, imported only now, so that `jaxmoe --help` is quick."""
    return importlib.import_module(f"jaxmoe.cli.{name.replace('-', '_')}")


def _version() -> str:
    from importlib import metadata

    return metadata.version("jaxmoe")
