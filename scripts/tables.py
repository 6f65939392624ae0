#!/usr/bin/env python
"""Writes the tables of figures into the documents, from the committed JSON."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))


def filled(text: str) -> str:
    """A document with the table of each pair of markers made anew."""
    figures = json.loads((ROOT / "benchmarks" / "cpu.json").read_text())
    begin, end = "<!-- cpu -->", "<!-- /cpu -->"
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{cpu_markdown(figures)}\n{end}{rest.partition(end)[2]}"


def cpu_markdown(figures: dict) -> str:
    """The figures of `benchmark.py cpu`."""
    seconds, rate = figures["median_seconds"], figures["decode_tokens_per_second"]
    ratio, versions, machine = figures["times_faster"], figures["versions"], figures["machine"]
    million = figures["parameters"] / 1e6
    return f"""\
| | jaxmoe | transformers | times faster |
|---|---|---|---|
| prefill of {figures["prompt_tokens"]} tokens, s | {seconds["jaxmoe"]["prefill"]:.2f} \
| {seconds["transformers"]["prefill"]:.2f} | {ratio["prefill"]:.1f} |
| greedy decode after it, tokens/s | {rate["jaxmoe"]:.1f} \
| {rate["transformers"]:.1f} | {ratio["decode"]:.1f} |

{million:.0f}M random parameters (hidden 512, 8 layers, 16 experts), float32, batch 1, the same
weights and the same greedy tokens on both sides; medians of {figures["repeats"]} runs taken in
turn on {machine["cores"]} cores of an {machine["processor"]}, {figures["date"]}, jax
{versions["jax"]}, torch {versions["torch"]}, transformers {versions["transformers"]}, which
computes every expert for every token. `make bench` measures it again; `scripts/tables.py` makes
this table from `benchmarks/cpu.json`."""


if __name__ == "__main__":
    main()
