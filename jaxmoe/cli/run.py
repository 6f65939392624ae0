"""Runs the command that a YAML file describes; flags after the file override what it says.

The file's keys are `command` and the names of that command's arguments and flags (docs/jobs.md).
"""

import argparse
import json
import shlex
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from jaxmoe.cli import main as commands
from jaxmoe.errors import UserError
from jaxmoe.parsing import Entry, read_yaml_entries

COMMAND = "command"
Actions = dict[str, argparse.Action]


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s JOB.yaml [--print] [FLAGS]", allow_abbrev=False
    )
    parser.add_argument("job", metavar="JOB.yaml", help="such as those in examples/jobs")
    parser.add_argument(
        "--print", action="store_true", help="print the command line that it stands for"
    )
    return parser


def main() -> None:
    """Runs the command."""
    args, flags = make_parser().parse_known_args()
    name, words = command_line(args.job, flags)
    if args.print:
        print(shlex.join(["jaxmoe", name, *words]))
    else:
        commands.start_command(name, words, prog=f"jaxmoe {name}")


def command_line(path: str, flags: Sequence[str] = ()) -> tuple[str, list[str]]:
    """The name of the command that a job stands for, and its arguments.

    Args:
        path: of the job's file.
        flags: those of the command that come after it, which override its keys.

    Raises:
        UserError: for a key that is no argument or flag of the command, one that is missing, or a
            value of another kind.
    """
    entries = {entry.key: entry for entry in read_yaml_entries(path)}
    if COMMAND not in entries:
        raise UserError(f"{path} lacks '{COMMAND}'; add a line such as '{COMMAND}: generate'.")
    name, *inner = _words(entries[COMMAND])
    known = [each for each in commands.COMMANDS if each != "run"]
    parser = commands.command_module(_nearest(path, entries[COMMAND], name, known)).make_parser()
    for word in inner:
        choices = _subcommands(parser)
        parser = choices[_nearest(path, entries[COMMAND], word, list(choices))]
    if choices := _subcommands(parser):
        raise UserError(
            f"{path} line {entries[COMMAND].line}: '{COMMAND}: {' '.join([name, *inner])}' is to "
            f"say which, one of {', '.join(choices)}."
        )
    given = _given(path, entries, _actions(parser), _overridden(parser, flags))
    _check_required(path, parser, given, flags)
    words = [word for entry, action in given.values() for word in _arguments(path, entry, action)]
    return name, [*inner, *words, *flags]


def _words(entry: Entry) -> list[str]:
    return entry.written.split() if isinstance(entry.written, str) and entry.written else [""]


def _nearest(path: str, entry: Entry, word: str, known: list[str]) -> str:
    """A word that is known.

    Raises:
        UserError: if it is not, which names the nearest one.
    """
    if word not in known:
        near = get_close_matches(word, known, n=1, cutoff=0)[0]
        raise UserError(
            f"{path} line {entry.line} has the unknown command {word!r:.80}; the nearest one is "
            f"'{near}'."
        )
    return word


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def _actions(parser: argparse.ArgumentParser) -> Actions:
    """What can be a key, by its name without dashes at its front; positional arguments first."""
    actions = [each for each in parser._actions if each.dest not in ("help", argparse.SUPPRESS)]
    positional = {each.dest: each for each in actions if not each.option_strings}
    return positional | {
        option.removeprefix("--"): each
        for each in actions
        for option in each.option_strings
        if option.startswith("--")
    }


def _overridden(parser: argparse.ArgumentParser, flags: Sequence[str]) -> list[argparse.Action]:
    """The actions of flags, which argparse accepts in a shortened form, too."""
    options = {f"--{name}": each for name, each in _actions(parser).items() if each.option_strings}
    found = []
    for flag in flags:
        text = flag.partition("=")[0]
        if text in options:
            found.append(options[text])
        elif text.startswith("--") and len(text) > 2:
            found += [each for option, each in options.items() if option.startswith(text)]
    return found


def _given(
    path: str, entries: dict[str, Entry], actions: Actions, overridden: list[argparse.Action]
) -> dict[str, tuple[Entry, argparse.Action]]:
    """The entries that count with their actions, by destination; positional arguments first."""
    names = {name.replace("_", "-"): action for name, action in actions.items()}
    found: dict[str, tuple[Entry, argparse.Action]] = {}
    for key, entry in entries.items():
        if key == COMMAND:
            continue
        action = names.get(key.replace("_", "-"))
        if action is None:
            near = get_close_matches(key, actions, n=1, cutoff=0)[0]
            raise UserError(
                f"{path} line {entry.line} has the unknown key {key!r:.80}; the nearest one is "
                f"'{near}'."
            )
        if action.dest in found:
            raise UserError(f"{path} line {entry.line} gives {key!r:.80} again; remove one.")
        if entry.value is not None and action not in overridden:
            found[action.dest] = entry, action
    order = [each.dest for each in actions.values()]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def _check_required(
    path: str, parser: argparse.ArgumentParser, given: dict[str, Any], flags: Sequence[str]
) -> None:
    overridden = _overridden(parser, flags)
    for name, action in _actions(parser).items():
        if action.required and action.dest not in given and action not in overridden:
            raise UserError(f"{path} lacks '{name}'; add it.")


def _arguments(path: str, entry: Entry, action: argparse.Action) -> Iterator[str]:
    """The words of a command line that an entry stands for."""
    flag = action.option_strings[0] if action.option_strings else ""
    if action.nargs == 0 or (action.nargs == "?" and isinstance(entry.value, bool)):
        if not isinstance(entry.value, bool):
            raise _wrong(path, entry, "true or false")
        if entry.value:
            yield flag
        return
    texts = _texts(path, entry, action)
    for text in texts:
        _check(path, entry, action, text)
    if not flag:
        yield from texts
    elif action.nargs in ("+", "*"):
        yield from (flag, *texts)
    else:
        yield from (f"{flag}={text}" for text in texts)


def _texts(path: str, entry: Entry, action: argparse.Action) -> list[str]:
    """The values of an entry; several where its action takes several."""
    several = action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction)
    value = entry.written
    if isinstance(value, dict) and "JSON" in str(action.metavar):
        return [json.dumps(entry.value)]
    if isinstance(value, dict):
        pairs = [f"{name}={_text(path, entry, each)}" for name, each in value.items()]
        return pairs if several else [",".join(pairs)]
    if isinstance(value, list):
        if not several:
            raise _wrong(path, entry, "one value")
        return [_text(path, entry, each) for each in value]
    return [value]


def _text(path: str, entry: Entry, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(path, entry, "texts and numbers")
    return value


def _check(path: str, entry: Entry, action: argparse.Action, text: str) -> None:
    """Raises a UserError for a value that the command would refuse."""
    kind: Any = action.type or str
    try:
        value = kind(text)
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        words = {int: "a whole number", float: "a number"}
        raise _wrong(path, entry, words.get(kind, str(action.metavar or "another"))) from None
    if action.choices is not None and value not in action.choices:
        raise _wrong(path, entry, " or ".join(map(str, action.choices)))


def _wrong(path: str, entry: Entry, expected: str) -> UserError:
    return UserError(
        f"{path} line {entry.line} gives {entry.key!r:.80} the value {entry.value!r:.80}; "
        f"expected {expected}."
    )
