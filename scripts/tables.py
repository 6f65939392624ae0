#!/usr/bin/env python
"""Writes the tables of figures into the documents, from the committed JSON."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTENDERS = {"jaxmoe": "jaxmoe", "cudnn": "cuDNN", "xla": "XLA", "torch": "torch"}
ATTENTION_COLUMNS = ("case", "unit", "jaxmoe", "of ceiling", *list(CONTENDERS.values())[1:])


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))


def filled(text: str) -> str:
    """A document with the table of each pair of markers made anew."""
    for name, made in (("cpu", _cpu), ("attention", _attention)):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, found, rest = text.partition(begin)
        if found:
            text = f"{head}{begin}\n{made()}\n{end}{rest.partition(end)[2]}"
    return text


def _cpu() -> str:
    return cpu_markdown(json.loads((ROOT / "benchmarks" / "cpu.json").read_text()))


def _attention() -> str:
    files = sorted((ROOT / "benchmarks").glob("attention-*.json"))
    return attention_markdown({file.name: json.loads(file.read_text()) for file in files})


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


def attention_markdown(by_file: dict[str, dict]) -> str:
    """The figures of `benchmark.py attention`, a table for each device that was at hand."""
    if not by_file:
        return """\
No GPU was at hand, so nothing was measured. On a machine with an H100 or H200,
`scripts/benchmark.py attention --output benchmarks/attention-h100.json` checks every kernel there,
times it beside cuDNN, XLA and torch, and writes the figures; `scripts/tables.py` then puts them
here."""
    return "\n\n".join(_device_markdown(name, figures) for name, figures in by_file.items())


def _device_markdown(name: str, figures: dict) -> str:
    rows = [ATTENTION_COLUMNS, ["---"] * len(ATTENTION_COLUMNS), *attention_rows(figures)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    versions = {of: version or "none" for of, version in figures["versions"].items()}
    checks, left_out = figures["checks"], "".join(f"\n{line}" for line in figures["left_out"])
    failed = f"; **{len(checks['failures'])} failed**" if checks["failures"] else ""
    return f"""\
{table}

{figures["device"]}, {figures["date"]}, jax {versions["jax"]}, driver {versions["driver"]}, ptxas
{versions["ptxas"]}, cuDNN {versions["cudnn"]}, torch {versions["torch"]}; XLA is this package's
own path in plain XLA, and n/a is what cannot express a case or failed. Medians of
{figures["rounds"]} rounds taken in turn, after {checks["run"]} checks against float32{failed}.
40 query and 8 key heads of 128, bf16, causal, chunks of 8,192. Operations are those that the mask
leaves, 2.5 times as many backward; bytes are those of the cache. Ceilings of the same run:
{ceilings_text(figures)}, of a matrix product and of a copy, whose writes count too.
`scripts/tables.py` makes this table from `benchmarks/{name}`.{left_out}"""


def ceilings_text(figures: dict) -> str:
    """What the device did on a large matrix product and a large copy."""
    ceilings = figures["ceilings"]
    return f"{ceilings['TFLOP/s']:.0f} TFLOP/s and {ceilings['TB/s']:.2f} TB/s"


def attention_rows(figures: dict) -> list[list[str]]:
    """A row of ATTENTION_COLUMNS for each case; n/a where there is no figure."""
    rows = []
    for case in figures["cases"]:
        ours, *others = (_rate(case["rates"][name]) for name in CONTENDERS)
        ratio = "n/a" if case["of_ceiling"] is None else f"{case['of_ceiling']:.2f}"
        rows.append([case["name"], case["unit"], ours, ratio, *others])
    return rows


def _rate(rate: float | None) -> str:
    if rate is None:
        return "n/a"
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def attention_errors(figures: dict) -> list[str]:
    """A line for each contender that raised on a case."""
    return [
        f"{case['name']}, {CONTENDERS[name]}: {error}"
        for case in figures["cases"]
        for name, error in case["errors"].items()
    ]


if __name__ == "__main__":
    main()
