"""Writes the tables of figures into the documents, from the committed JSON files."""

import argparse
import json
import textwrap
from pathlib import Path

from benchmarks.training_tables import train_markdown, train_memory_markdown
from jaxmoe.benchmarks import tables
from jaxmoe.plan import scheduled

ROOT = Path(__file__).parent.parent
TPUS = "v5p", "v6e"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        document.write_text(filled(document.read_text()))
    scheduled.FILE.write_text(schedule_factors())


def filled(text: str) -> str:
    """The text of a document with the table between each pair of markers replaced."""
    writers = {
        "cpu": _cpu,
        "train-cpu": _train_cpu,
        "engine": _engine,
        "convert": _convert,
        "attention": _attention,
        "moe": _moe,
        "quantized": _quantized,
        "schedule": _schedule,
        "schedule-v5p": lambda: _bundles("v5p"),
        "schedule-v6e": lambda: _bundles("v6e"),
        "step": _step,
        "train-memory": _train_memory,
        "batch": _batch,
    }
    for name, table in writers.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, marker, rest = text.partition(begin)
        if marker:
            text = f"{head}{begin}\n{table()}\n{end}{rest.partition(end)[2]}"
    return text


def _cpu() -> str:
    return cpu_markdown(json.loads((ROOT / "benchmarks" / "cpu.json").read_text()))


def _train_cpu() -> str:
    return train_markdown(json.loads((ROOT / "benchmarks" / "train-cpu.json").read_text()))


def _batch() -> str:
    """The figures of `jaxmoe benchmark batch`."""
    figures = json.loads((ROOT / "benchmarks" / "batch.json").read_text())
    run = figures["run"]
    rows = [
        ["the host's time a request, beside the model, ms", "host_milliseconds_a_request", ".2f"],
        ["memory after a tenth of the job, MiB", "mebibytes_after_a_tenth", ".1f"],
        ["memory at its end, MiB", "mebibytes_at_the_end", ".1f"],
        ["the same command again, which finds all done, s", "seconds_to_find_all_done", ".2f"],
    ]
    columns = (f"{figures['requests']:,} requests of a tiny model, one program", "")
    table = tables.Grid(columns, [[name, f"{figures[key]:{form}}"] for name, key, form in rows])
    return (
        f"{tables.markdown(table)}\n\nMeasured by `jaxmoe benchmark batch` on {run['date']}, "
        f"{run['machine']['cores']} cores of an {run['machine']['processor']}."
    )


def _engine() -> str:
    file = ROOT / "benchmarks" / "engine.json"
    return engine_markdown(json.loads(file.read_text())) if file.exists() else ""


def _convert() -> str:
    return convert_markdown(json.loads((ROOT / "benchmarks" / "convert.json").read_text()))


def _attention() -> str:
    return attention_markdown(_measured("attention"))


def _moe() -> str:
    return moe_markdown(_measured("moe"))


def _quantized() -> str:
    return quantized_markdown(json.loads((ROOT / "demo" / "quantized.json").read_text()))


def _schedule() -> str:
    return schedule_markdown(_schedule_of("h100"))


def _bundles(tpu: str) -> str:
    return bundles_markdown(_schedule_of(tpu))


def schedule_factors() -> str:
    """What the plan knows of the TPUs' schedules, as JSON."""
    factors = {tpu: scheduled.factors(_schedule_of(tpu)) for tpu in TPUS}
    return json.dumps(factors, indent=2) + "\n"


def _schedule_of(device: str) -> dict:
    return json.loads((ROOT / "benchmarks" / f"schedule-{device}.json").read_text())


def _step() -> str:
    runs = _measured("step")
    return "\n\n".join(step_markdown(name, figures) for name, figures in runs.items())


def _train_memory() -> str:
    return train_memory_markdown(
        json.loads((ROOT / "benchmarks" / "train-memory.json").read_text())
    )


def _measured(benchmark: str) -> dict[str, dict]:
    """The figures of a benchmark's runs that timed anything, by file name."""
    files = sorted((ROOT / "benchmarks").glob(f"{benchmark}-*.json"))
    runs = {file.name: json.loads(file.read_text()) for file in files}
    return {
        name: figures
        for name, figures in runs.items()
        if figures.get("cases") or figures.get("batches")
    }


def convert_markdown(figures: dict) -> str:
    """The figures of `jaxmoe benchmark convert` as Markdown."""
    nbytes, cp = figures["run"]["bytes"], figures["ways"]["cp, sync"]["seconds"]
    bare = figures["bare_interpreter_bytes"]
    rows = []
    for name, run in figures["ways"].items():
        memory = f"{(run['peak_bytes'] - bare) / 1e9:.2f} GB" if name in figures["loads"] else ""
        rate = f"{nbytes / run['seconds'] / 1e9:.2f} | {cp / run['seconds']:.2f}"
        rows.append(f"| `{name}` | {rate} | {memory} |")
    for name, run in figures["loads"].items():
        rate = run["bytes"] / run["seconds"] / 1e9
        memory = f"{run['peak_bytes'] / run['bytes']:.2f} of its size"
        rows.append(f"| loading what `{name}` made | {rate:.2f} | | {memory} |")
    for name, run in figures["answers"].items():
        beyond = (run["peak_bytes"] - run["bytes"]) / 1e9
        memory = f"{run['bytes'] / 1e9:.2f} + {beyond:.2f} GB"
        rows.append(f"| running what `{name}` made | | | {memory} |")
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
    """The figures of `jaxmoe evaluate quantized` as Markdown."""
    rows = "\n".join(
        f"| {x['part']} | {x['format']} | {x['logit_error']:.1e} | {x['perplexity']:+.3%} |"
        for x in figures["results"]
    )
    return f"""\
| what | format | logit error | perplexity |
|---|---|---|---|
{rows}

The demo model in float32 on {figures["tokens"]:,} tokens that it sampled itself,
{figures["nats_per_token"]:.3f} nats a token; root mean square errors over those of the logits. Its
heads have 24 elements, Llama 4's 128 with one scale for all: expect a little more there.
`jaxmoe evaluate quantized` measures it; `scripts/tables.py` makes this table from
`demo/quantized.json`."""


def cpu_markdown(figures: dict) -> str:
    """The figures of `jaxmoe benchmark cpu` as Markdown."""
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


def engine_markdown(figures: dict) -> str:
    """The figures of `jaxmoe benchmark engine` as Markdown."""
    versions, machine, names = figures["versions"], figures["machine"], []
    for workload in figures["workloads"]:
        prompts, answers = workload["prompt_tokens"], workload["answer_tokens"]
        sizes = f"{prompts:,} tokens of prompts and {answers:,} of answers"
        names.append(f"{workload['workload']}: {workload['requests']} requests, {sizes}.")
    rounds = figures["rounds"]
    runs = "one run each" if rounds == 1 else f"medians of {rounds} runs"
    text = f"""\
{figures["parameters"] / 1e6:.0f}M {figures["model"]} parameters, float32, greedy; {runs} \
taken in turn on {machine["cores"]} cores of an {machine["processor"]}, \
{figures["date"]}, jax {versions["jax"]}{_beside_transformers(figures)}. Tokens/s are those of \
answers, over the whole run. First token: seconds from the run's start, median and, in brackets, \
90th percentile. Slots a token: what steps compute for each token that is no padding. Host: \
processor time of the engine's thread. Programs: compiled steps of the model. {" ".join(names)} \
`jaxmoe benchmark engine` measures it again; `scripts/tables.py` makes this table from \
`benchmarks/engine.json`."""
    wrapped = textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
    return f"{tables.markdown(tables.engine_grid(figures))}\n\n{wrapped}"


def _beside_transformers(figures: dict) -> str:
    """The versions of the other side and what it does; empty if it did not run."""
    sides = [side for workload in figures["workloads"] if (side := workload["transformers"])]
    if not sides:
        return ""
    versions = sides[0]["versions"]
    return (
        f", torch {versions['torch']}, transformers {versions['transformers']}, whose `generate` "
        f"is given the same requests in left-padded batches of {sides[0]['batch']}, each until its "
        f"longest answer is complete; {tables.identical_text(figures)}"
    )


def attention_markdown(by_file: dict[str, dict]) -> str:
    """The figures of `jaxmoe benchmark attention` as Markdown, a table for each file."""
    if not by_file:
        return _unmeasured("attention", "cuDNN, XLA and torch")
    return "\n\n".join(_attention_of(name, figures) for name, figures in by_file.items())


def _unmeasured(benchmark: str, others: str) -> str:
    return f"""\
No GPU was at hand, so nothing was measured. On a machine with an H100 or H200,
`jaxmoe benchmark {benchmark} --output benchmarks/{benchmark}-h100.json` checks every kernel
there, times it beside {others}, and writes the figures;
`scripts/tables.py` then puts them here."""


def _attention_of(name: str, figures: dict) -> str:
    versions = _versions(figures)
    return f"""\
{tables.markdown(tables.attention_grid(figures))}

{_run(figures)},
cuDNN {versions["cudnn"]}, torch {versions["torch"]};
XLA is this package's own path in plain XLA, and n/a is what cannot express a case or failed.
{_method(figures)}
40 query and 8 key heads of 128, bf16, causal, chunks of 8,192. Operations are those that the mask
leaves, 2.5 times as many backward; bytes are those of the cache. {_source(name, figures)}"""


def moe_markdown(by_file: dict[str, dict]) -> str:
    """The figures of `jaxmoe benchmark moe` as Markdown, two tables for each file."""
    if not by_file:
        return _unmeasured("moe", "ragged_dot, dense products, XLA and transformers")
    return "\n\n".join(_moe_of(name, figures) for name, figures in by_file.items())


def _moe_of(name: str, figures: dict) -> str:
    versions = _versions(figures)
    random = {**figures, "cases": [x for x in figures["cases"] if x["routing"] == "random"]}
    return f"""\
{tables.markdown(tables.moe_grid(random))}

{_run(figures)},
torch {versions["torch"]}, transformers {versions["transformers"]}.
{_method(figures)}
Width 5,120, 16 (Scout) or 128 experts (Maverick) of width 8,192, top-1, bf16; each token's expert
is drawn uniformly. Others are in ms, and n/a is what cannot express a case or failed. XLA is this
package's own path in plain XLA; ragged_dot is `jax.lax.ragged_dot` on sorted rows; dense has no
groups: it multiplies fewer rows with all matrices that are in use side by side, so that operations
and weights are the same; transformers computes every expert for every token. TB/s are of weights
read, of their gradient written or, for a move, of rows. Of ceiling: the time of the nearer ceiling
over that of jaxmoe. {_source(name, figures)}{_skew(figures)}"""


def _skew(figures: dict) -> str:
    """The table of routings, if a case was timed with several."""
    grid = tables.skew_grid(figures)
    if not grid.rows:
        return ""
    return f"""

{tables.markdown(grid)}

The same kernels by how tokens choose experts, in ms; in brackets, times what the longest group
costs alone. Skewed: the nth most popular expert gets 1/n as many tokens as the first; worst: all
tokens choose one."""


def step_markdown(name: str, figures: dict) -> str:
    """The figures of `jaxmoe benchmark step` as Markdown, and kernels' times of a profile."""
    model = f"{figures['model'].capitalize()}, {figures['layers']} layers"
    chunk = figures["batches"][0]["prefill_chunk"]
    text = f"""\
{tables.markdown(tables.step_grid(figures))}

{model}, {figures["weights"]} weights, {figures["kv"]} cache, {figures["context"]:,} tokens a row;
{_run(figures)}.
Medians of runs of 16 steps; of prefill the last chunk, {chunk:,} tokens a row. Bound and estimate
are `jaxmoe plan`'s.
`scripts/tables.py` makes this table from `benchmarks/{name}`."""
    grids = [_profile(profile) for profile in figures.get("profiles", [])]
    return "\n\n".join([text, *grids])


def _profile(profile: dict) -> str:
    """The kernels that take the most time of a step, from a profile."""
    busy = profile["busy_microseconds"]
    rows = [
        [x["name"].removesuffix("_kernel"), f"{x['calls']:g}", f"{x['microseconds']:,.0f}",
         f"{x['microseconds'] / busy:.0%}"]
        for x in profile["kernels"]
        if x["microseconds"] > 0.01 * busy
    ]  # fmt: skip
    title = f"{profile['task'].capitalize()}, {profile['rows']} row{'s' * (profile['rows'] > 1)}"
    grid = tables.Grid((title, "calls", "us", "of the step"), rows)
    launches = f"{profile['launches']:.0f} launches"
    return f"{tables.markdown(grid)}\n\n{busy:,.0f} us in {launches}, by JAX's profiler."


def schedule_markdown(figures: dict) -> str:
    """The figures of `jaxmoe benchmark schedule` as Markdown."""
    versions, processor = _versions(figures), figures["processor"]
    return f"""\
{tables.markdown(tables.schedule_grid(figures))}

{tables.markdown(tables.steps_grid(figures))}

Static: {figures["static"]}. {figures["target"].upper()}:
{processor["cores"]} multiprocessors at {processor["clock"] / 1e9:.2f} GHz and \
{processor["bandwidth"] / 1e12:.2f} TB/s. jax {versions["jax"]}, ptxas {versions["ptxas"]},
{figures["date"]}. `scripts/tables.py` makes these tables from `benchmarks/schedule-h100.json`."""


def bundles_markdown(figures: dict) -> str:
    """The figures of `jaxmoe benchmark schedule` for TPUs as Markdown."""
    versions, core, target = _versions(figures), figures["core"], figures["target"]
    cores = f"{core['cores']} core{'s' if core['cores'] > 1 else ''}"
    text = f"""\
Static: {figures["static"]}. {target}: {cores} at {core["clock"] / 1e9:.2f} GHz, each with \
{core["product_flops"]:,} operations of products a cycle, and {core["bandwidth"] / 1e12:.2f} TB/s. \
jax {versions["jax"]}, libtpu {versions["libtpu"]}, {figures["date"]}. `scripts/tables.py` makes \
these tables from `benchmarks/schedule-{target}.json`."""
    grids = "\n\n".join(map(tables.markdown, tables.schedule_grids(figures)))
    errors = "\n".join(f"- {line}" for line in tables.schedule_errors(figures))
    wrapped = textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
    return f"{grids}\n\nWithout figures:\n\n{errors}\n\n{wrapped}"


def _versions(figures: dict) -> dict[str, str]:
    return {name: version or "none" for name, version in figures["versions"].items()}


def _run(figures: dict) -> str:
    versions = _versions(figures)
    return (
        f"{figures['device']}, {figures['date']}, jax {versions['jax']}, driver "
        f"{versions['driver']}, ptxas {versions['ptxas']}"
    )


def _method(figures: dict) -> str:
    rounds = f"Medians of {figures['rounds']} rounds taken in turn"
    if "checks" not in figures:
        note = figures.get("note", "Nothing was checked in this run.")
        return textwrap.fill(f"{rounds}. {note}", 100)
    checks = figures["checks"]
    failed = f"; **{len(checks['failures'])} failed**" if checks["failures"] else ""
    return f"{rounds}, after {checks['run']} checks against float32{failed}."


def _source(name: str, figures: dict) -> str:
    left_out = "".join(f"\n{line}" for line in figures["left_out"])
    return (
        f"Ceilings of the same run:\n{tables.ceilings_text(figures)}, "
        "of a matrix product and of a copy, whose writes count too.\n"
        f"`scripts/tables.py` makes this table from `benchmarks/{name}`."
        f"{left_out}"
    )
