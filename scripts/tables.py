#!/usr/bin/env python
"""Writes the tables of figures into the documents, from the committed JSON."""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
ATTENTION_CONTENDERS = {"jaxmoe": "jaxmoe", "cudnn": "cuDNN", "xla": "XLA", "torch": "torch"}
MOE_CONTENDERS = {
    "jaxmoe": "jaxmoe",
    "xla": "XLA",
    "ragged": "ragged_dot",
    "dense": "dense",
    "transformers": "transformers",
}
LONGEST = {"longest": "longest group alone"}  # jaxmoe, with all other groups' tokens left out
ROUTINGS = ("balanced", "random", "skewed", "worst")


class Grid(NamedTuple):
    """A table of figures."""

    columns: tuple[str, ...]
    rows: list[list[str]]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for document in (ROOT / "README.md", ROOT / "docs" / "schedule.md"):
        document.write_text(filled(document.read_text()))


def filled(text: str) -> str:
    """A document with the table of each pair of markers made anew."""
    tables = {
        "cpu": _cpu,
        "convert": _convert,
        "attention": _attention,
        "moe": _moe,
        "quantized": _quantized,
        "schedule": _schedule,
    }
    for name, made in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, found, rest = text.partition(begin)
        if found:
            text = f"{head}{begin}\n{made()}\n{end}{rest.partition(end)[2]}"
    return text


def _cpu() -> str:
    return cpu_markdown(json.loads((ROOT / "benchmarks" / "cpu.json").read_text()))


def _convert() -> str:
    return convert_markdown(json.loads((ROOT / "benchmarks" / "convert.json").read_text()))


def _attention() -> str:
    return attention_markdown(_measured("attention"))


def _moe() -> str:
    return moe_markdown(_measured("moe"))


def _quantized() -> str:
    return quantized_markdown(json.loads((ROOT / "demo" / "quantized.json").read_text()))


def _schedule() -> str:
    return schedule_markdown(json.loads((ROOT / "benchmarks" / "schedule-h100.json").read_text()))


def _measured(benchmark: str) -> dict[str, dict]:
    """By file, those of its runs that timed anything."""
    files = sorted((ROOT / "benchmarks").glob(f"{benchmark}-*.json"))
    runs = {file.name: json.loads(file.read_text()) for file in files}
    return {name: figures for name, figures in runs.items() if figures.get("cases")}


def convert_markdown(figures: dict) -> str:
    """The figures of `benchmark.py convert`."""
    nbytes, cp = figures["run"]["bytes"], figures["ways"]["cp, sync"]["seconds"]
    bare = figures["bare_interpreter_bytes"]
    rows = []
    for way, found in figures["ways"].items():
        memory = f"{(found['peak_bytes'] - bare) / 1e9:.2f} GB" if way in figures["loads"] else ""
        rate = f"{nbytes / found['seconds'] / 1e9:.2f} | {cp / found['seconds']:.2f}"
        rows.append(f"| `{way}` | {rate} | {memory} |")
    for way, found in figures["loads"].items():
        rate = found["bytes"] / found["seconds"] / 1e9
        memory = f"{found['peak_bytes'] / found['bytes']:.2f} of its size"
        rows.append(f"| loading what `{way}` made | {rate:.2f} | | {memory} |")
    for way, found in figures["answers"].items():
        memory = (
            f"{found['bytes'] / 1e9:.2f} + {(found['peak_bytes'] - found['bytes']) / 1e9:.2f} GB"
        )
        rows.append(f"| running what `{way}` made | | | {memory} |")
    run = figures["run"]
    return f"""\
| | GB/s | times the rate of `cp, sync` | peak memory |
|---|---|---|---|
{chr(10).join(rows)}

A synthetic checkpoint of {nbytes / 1e9:.1f} GB: one layer of Scout with all its experts, and a
vocabulary of 65,536. Whole processes, Python's start included. `cp, sync` also waits until its copy
is on disk, as converting does. Memory of converting is beyond that of a bare interpreter; loading
goes onto eight simulated devices (`fsdp=8`); running is on one: the weights, and what is beyond
them in a process that loads them, reads 16 tokens and writes 4. Matrices in 8 or 4 bits are not
widened beside their stored form: that would take gigabytes more than bf16 does, not less. Medians
of {run["rounds"]} runs taken in turn on 2 cores, {run["date"]}; all read from the page cache."""


def quantized_markdown(figures: dict) -> str:
    """The figures of `evaluate.py quantized`."""
    rows = "\n".join(
        f"| {each['part']} | {each['format']} | {each['logit_error']:.1e} "
        f"| {each['perplexity']:+.3%} |"
        for each in figures["results"]
    )
    return f"""\
| what | format | logit error | perplexity |
|---|---|---|---|
{rows}

The demo model in float32 on {figures["tokens"]:,} tokens that it sampled itself,
{figures["nats_per_token"]:.3f} nats a token; root mean square errors over those of the logits. Its
heads have 24 elements, Llama 4's 128 with one scale for all: expect a little more there.
`scripts/evaluate.py quantized` measures it; `scripts/tables.py` makes this table from
`demo/quantized.json`."""


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
        return _unmeasured("attention", "cuDNN, XLA and torch")
    return "\n\n".join(_attention_of(name, figures) for name, figures in by_file.items())


def _unmeasured(benchmark: str, others: str) -> str:
    return f"""\
No GPU was at hand, so nothing was measured. On a machine with an H100 or H200,
`scripts/benchmark.py {benchmark} --output benchmarks/{benchmark}-h100.json` checks every kernel
there, times it beside {others}, and writes the figures;
`scripts/tables.py` then puts them here."""


def _attention_of(name: str, figures: dict) -> str:
    versions = _versions(figures)
    return f"""\
{_markdown(attention_grid(figures))}

{_run(figures)}, cuDNN {versions["cudnn"]}, torch {versions["torch"]};
XLA is this package's own path in plain XLA, and n/a is what cannot express a case or failed.
{_method(figures)}
40 query and 8 key heads of 128, bf16, causal, chunks of 8,192. Operations are those that the mask
leaves, 2.5 times as many backward; bytes are those of the cache. {_source(name, figures)}"""


def moe_markdown(by_file: dict[str, dict]) -> str:
    """The figures of `benchmark.py moe`, two tables for each file."""
    if not by_file:
        return _unmeasured("moe", "ragged_dot, dense products, XLA and transformers")
    return "\n\n".join(_moe_of(name, figures) for name, figures in by_file.items())


def _moe_of(name: str, figures: dict) -> str:
    versions = _versions(figures)
    random = {**figures, "cases": [x for x in figures["cases"] if x["routing"] == "random"]}
    return f"""\
{_markdown(moe_grid(random))}

{_run(figures)}, torch {versions["torch"]},
transformers {versions["transformers"]}. {_method(figures)}
Width 5,120, 16 (Scout) or 128 experts (Maverick) of width 8,192, top-1, bf16; each token's expert
is drawn uniformly. Others are in ms, and n/a is what cannot express a case or failed. XLA is this
package's own path in plain XLA; ragged_dot is `jax.lax.ragged_dot` on sorted rows; dense has no
groups: it multiplies fewer rows with all matrices that are in use side by side, so that operations
and weights are the same; transformers computes every expert for every token. TB/s are of weights
read, of their gradient written or, for a move, of rows. Of ceiling: the time of the nearer ceiling
over that of jaxmoe. {_source(name, figures)}

{_markdown(skew_grid(figures))}

The same kernels by how tokens choose experts, in ms; in brackets, times what the longest group
costs alone. Skewed: the nth most popular expert gets 1/n as many tokens as the first; worst: all
tokens choose one."""


def schedule_markdown(figures: dict) -> str:
    """The figures of `benchmark.py schedule`."""
    versions, processor = _versions(figures), figures["processor"]
    return f"""\
{_markdown(schedule_grid(figures))}

{_markdown(steps_grid(figures))}

Static: {figures["static"]}. {figures["target"].upper()}:
{processor["cores"]} multiprocessors at {processor["clock"] / 1e9:.2f} GHz and \
{processor["bandwidth"] / 1e12:.2f} TB/s. jax {versions["jax"]}, ptxas {versions["ptxas"]},
{figures["date"]}. `scripts/tables.py` makes these tables from `benchmarks/schedule-h100.json`."""


def schedule_grid(figures: dict) -> Grid:
    """A row for each hot loop: the cycles of a turn by resource, and what they say."""
    resources = ("issue", "tensor", "mufu", "alu", "memory")
    rows = []
    for kernel in figures["kernels"]:
        registers = f"{kernel.get('registers')}{' (spills)' if kernel.get('spill_stores') else ''}"
        for loop in kernel.get("loops", []):
            name = f"{kernel['kernel']}{', masked' if loop['name'] else ''}"
            cycles = [
                f"{loop['cycles'][x]:.0f}" if loop["cycles"].get(x) else "" for x in resources
            ]
            rows.append([name, kernel["by"], registers, *cycles, *_findings(loop)])
    return Grid(
        ("kernel", "by", "registers", *resources, "bound by", "MUFU overlapped", "TB/s"), rows
    )


def _findings(loop: dict) -> list[str]:
    mufu, rate = loop["counts"]["mufu"], loop["read_rate"]
    overlapped = f"{loop['mufu_under_products']} of {mufu}" if mufu else ""
    return [loop["bound_by"], overlapped, "" if rate is None else f"{rate / 1e12:.1f}"]


def steps_grid(figures: dict) -> Grid:
    """A row for each step: the device operations that a further layer adds."""
    found = {kind for step in figures["steps"] for kind in step["a_layer"]}
    kinds = sorted(found, key=lambda kind: (-figures["steps"][0]["a_layer"].get(kind, 0), kind))
    rows = [
        [
            f"{step['model']}, {step['rows']} row{'s' if step['rows'] > 1 else ''}",
            f"{sum(step['a_layer'].values()):g}",
            *(f"{step['a_layer'].get(kind, 0):g}" for kind in kinds),
            "; ".join(f"{kind}: {count}" for kind, count in step["by_layer"].items()),
        ]
        for step in figures["steps"]
    ]
    return Grid(("decoding", "operations a layer", *kinds, "by kind of layer"), rows)


def _markdown(grid: Grid) -> str:
    rows = [grid.columns, ["---"] * len(grid.columns), *grid.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _versions(figures: dict) -> dict[str, str]:
    return {of: version or "none" for of, version in figures["versions"].items()}


def _run(figures: dict) -> str:
    versions = _versions(figures)
    return (
        f"{figures['device']}, {figures['date']}, jax {versions['jax']}, driver "
        f"{versions['driver']}, ptxas {versions['ptxas']}"
    )


def _method(figures: dict) -> str:
    checks = figures["checks"]
    failed = f"; **{len(checks['failures'])} failed**" if checks["failures"] else ""
    return (
        f"Medians of {figures['rounds']} rounds taken in turn, after {checks['run']} checks "
        f"against float32{failed}."
    )


def _source(name: str, figures: dict) -> str:
    left_out = "".join(f"\n{line}" for line in figures["left_out"])
    return (
        f"Ceilings of the same run:\n{ceilings_text(figures)}, of a matrix product and of a copy, "
        f"whose writes count too.\n`scripts/tables.py` makes this table from `benchmarks/{name}`."
        f"{left_out}"
    )


def ceilings_text(figures: dict) -> str:
    """What the device did on a large matrix product and a large copy."""
    ceilings = figures["ceilings"]
    return f"{ceilings['TFLOP/s']:.0f} TFLOP/s and {ceilings['TB/s']:.2f} TB/s"


def attention_grid(figures: dict) -> Grid:
    """Rates of each case; n/a where there is no figure."""
    first, *others = ATTENTION_CONTENDERS.values()
    rows = []
    for case in figures["cases"]:
        (unit,) = case["work"]
        ours, *theirs = (_rate(case["rates"][name], unit) for name in ATTENTION_CONTENDERS)
        rows.append([case["name"], unit, ours, _ratio(case["of_ceiling"]), *theirs])
    return Grid(("case", "unit", first, "of ceiling", *others), rows)


def moe_grid(figures: dict) -> Grid:
    """Of each case the time, the rates and the others' times."""
    _, *others = MOE_CONTENDERS
    units = ("TFLOP/s", "TB/s")
    rows = []
    for case in figures["cases"]:
        seconds, rates = case["seconds"], case["rates"]["jaxmoe"]
        ours = [_ms(seconds["jaxmoe"]), *(_rate(rates, unit) for unit in units)]
        theirs = [_ms(seconds[name]) for name in others]
        rows.append([case["name"], *ours, _ratio(case["of_ceiling"]), *theirs])
    names = [MOE_CONTENDERS[name] for name in others]
    return Grid(("case", "ms", *units, "of ceiling", *names), rows)


def skew_grid(figures: dict) -> Grid:
    """Times of jaxmoe by routing, and how many times the longest group's alone."""
    by_case: dict[str, dict[str, dict]] = {}
    for case in figures["cases"]:
        by_routing = by_case.setdefault(case["name"].replace(f"-{case['routing']}", ""), {})
        by_routing[case["routing"]] = case["seconds"]
    rows = [
        [name, *(_skewed(found.get(routing)) for routing in ROUTINGS), _worst(found)]
        for name, found in by_case.items()
        if len(found) > 1
    ]
    return Grid(("case", *ROUTINGS, "worst / balanced"), rows)


def _skewed(seconds: dict | None) -> str:
    if not seconds or not seconds["jaxmoe"]:
        return "n/a"
    alone = seconds["longest"]
    return _ms(seconds["jaxmoe"]) + (f" ({seconds['jaxmoe'] / alone:.2f})" if alone else "")


def _worst(by_routing: dict[str, dict]) -> str:
    worst, balanced = (by_routing.get(x, {}).get("jaxmoe") for x in ("worst", "balanced"))
    return _ratio(worst / balanced if worst and balanced else None)


def _ratio(ratio: float | None) -> str:
    return "n/a" if ratio is None else f"{ratio:.2f}"


def _ms(seconds: float | None) -> str:
    return "n/a" if seconds is None else _three_digits(1e3 * seconds)


def _rate(rates: dict[str, float] | None, unit: str) -> str:
    return "n/a" if not rates or unit not in rates else _three_digits(rates[unit])


def _three_digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def error_lines(figures: dict, contenders: dict[str, str]) -> list[str]:
    """A line for each contender that raised on a case."""
    return [
        f"{case['name']}, {contenders[name]}: {error}"
        for case in figures["cases"]
        for name, error in case["errors"].items()
    ]


if __name__ == "__main__":
    main()
