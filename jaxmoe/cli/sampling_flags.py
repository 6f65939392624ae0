"""The flags of `jaxmoe generate` that say how tokens are chosen, and what ends an answer."""

import argparse
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.generation.grammar import Grammar
from jaxmoe.generation.sampling import Sampling, sampling_of
from jaxmoe.parsing import read_text

# Flags that are fields of `Sampling`.
NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_ids",
    "ignore_eos",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "prompt_logprobs",
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `sampling_by` reads."""
    group = parser.add_argument_group("settings of answers, which lines of --prompts may change")
    _add_choice(group)
    _add_ends(group)
    _add_reports(group)
    _add_grammars(group.add_mutually_exclusive_group())


def _add_choice(group: Any) -> None:
    own = "default: the checkpoint's, else"
    group.add_argument("--temperature", type=float, metavar="T", help=f"0: greedy; {own} 0.6")
    group.add_argument("--top-p", type=float, metavar="P", help=f"{own} 0.9")
    group.add_argument("--top-k", type=int, metavar="K", help=f"0: all; {own} 0")
    group.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help=f"keep tokens of at least P times the largest probability; {own} 0",
    )
    group.add_argument("--seed", type=int, default=0, metavar="S")
    group.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help=f"divide the logits of tokens in prompt or answer; {own} 1",
    )
    for kind, what in (("presence", "in the answer"), ("frequency", "each time in the answer")):
        text = f"subtract from the logits of tokens {what}; -2 to 2"
        group.add_argument(f"--{kind}-penalty", type=float, metavar="X", help=text)


def _add_ends(group: Any) -> None:
    text = "ends the answer when it appears; repeatable"
    group.add_argument("--stop", action="append", metavar="TEXT", help=text)
    text = "a token that ends the answer; repeatable"
    group.add_argument(
        "--stop-id", action="append", type=int, dest="stop_ids", metavar="TOKEN", help=text
    )
    group.add_argument(
        "--ignore-eos",
        action="store_true",
        default=None,
        help="the model's own stop tokens do not end the answer",
    )
    text = "so many tokens come before what ends the answer"
    group.add_argument("--min-tokens", type=int, metavar="N", help=text)


def _add_reports(group: Any) -> None:
    text = "report the log-probabilities of tokens and of the N likeliest"
    group.add_argument("--logprobs", type=int, metavar="N", help=text)
    group.add_argument("--prompt-logprobs", type=int, metavar="N", help="the same of the prompt")


def _add_grammars(group: Any) -> None:
    text = "the answer is JSON of this schema"
    group.add_argument("--json-schema", metavar="FILE|JSON", help=text)
    group.add_argument("--regex", metavar="REGEX", help="the whole answer matches it")
    text = "the answer follows it: llguidance's Lark, or GBNF"
    group.add_argument("--grammar", metavar="FILE", help=text)


def sampling_by(args: argparse.Namespace) -> Sampling:
    """The settings that the flags give, else those of the checkpoint.

    Raises:
        UserError: for a value out of range, or a grammar that cannot be used.
    """
    given = {name: getattr(args, name) for name in NAMES}
    wanted = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}
    return sampling_of(args.checkpoint, **wanted, grammar=_grammar(args))


def check_written(args: argparse.Namespace) -> None:
    """Raises a UserError for log-probabilities where only text is written."""
    if args.prompt is not None and not args.output:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(args, name) is not None:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is written as JSON; use --output or --prompts too.")


def _grammar(args: argparse.Namespace) -> Grammar | None:
    if args.json_schema is not None:
        is_json = args.json_schema.lstrip().startswith("{")
        text = args.json_schema if is_json else read_text(args.json_schema)
        return _made("json-schema", "json_schema", text)
    if args.regex is not None:
        return _made("regex", "regex", args.regex)
    return _made("grammar", "lark", read_text(args.grammar)) if args.grammar is not None else None


def _made(flag: str, kind: Any, text: str) -> Grammar:
    try:
        return Grammar(kind, text)
    except UserError as error:
        raise UserError(f"--{flag}: {error}") from None
