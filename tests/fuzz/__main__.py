"""Tries mutated inputs: `python -m tests.fuzz --count 20000`, over all kinds.

Each kind runs in a process of its own, so that an abort is one fault and ends nothing else.
`--kind NAME --first SEED --count 1` tries one again.
"""

import argparse
import collections
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.fuzz.kinds import KINDS
from tests.fuzz.runner import GOOD, Outcome, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="default: all")
    parser.add_argument("--count", type=int, default=20_000, metavar="N", help="of inputs in all")
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--child", action="store_true", help="print outcomes as JSON lines")
    args = parser.parse_args()
    names = args.kind or list(KINDS)
    seeds = range(args.first, args.first + -(-args.count // len(names)))
    if args.child:
        for name in names:
            for outcome in run(KINDS[name], seeds):
                print(json.dumps(dataclasses.asdict(outcome)), flush=True)
        return 0
    return report(names, seeds)


def report(names: list[str], seeds: range) -> int:
    """Prints the faults as they come, and how many inputs of each kind ended how."""
    counts: dict[str, collections.Counter] = {name: collections.Counter() for name in names}
    outcomes = (outcome for name in names for outcome in in_children(name, seeds))
    total = len(names) * len(seeds)
    shown = Console(stderr=True)
    hidden = not shown.is_terminal
    for outcome in track(outcomes, "Fuzzing", total, console=shown, disable=hidden):
        counts[outcome.kind][outcome.verdict] += 1
        if outcome.verdict not in GOOD:
            print(f"{outcome.kind} {outcome.seed} ({outcome.file}): {outcome.verdict}")
            print(outcome.detail, flush=True)
    verdicts = [*GOOD, *sorted({v for count in counts.values() for v in count} - {*GOOD})]
    table = Table("kind", "inputs", *verdicts)
    for name, count in counts.items():
        table.add_row(name, str(count.total()), *(str(count[verdict]) for verdict in verdicts))
    whole = sum(counts.values(), collections.Counter())
    table.add_row("all", str(whole.total()), *(str(whole[verdict]) for verdict in verdicts))
    Console().print(table)
    return int(any(whole[verdict] for verdict in verdicts[len(GOOD) :]))


def in_children(name: str, seeds: range) -> Iterator[Outcome]:
    """Outcomes of another process, and of one after it where that one ended early."""
    seed = seeds.start
    while seed < seeds.stop:
        count = seeds.stop - seed
        options = ["--kind", name, "--first", str(seed), "--count", str(count), "--child"]
        command = [sys.executable, "-m", "tests.fuzz", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            for line in child.stdout or ():
                outcome = Outcome(**json.loads(line))
                seed = outcome.seed + 1
                yield outcome
        if child.returncode == 1:  # it says why on stderr
            sys.exit(f"{name}: the undamaged input cannot be read")
        if child.returncode:
            yield Outcome(name, seed, "?", "abort", f"exit status {child.returncode}")
            seed += 1


if __name__ == "__main__":
    sys.exit(main())
