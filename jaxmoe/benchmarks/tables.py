"""Makes the tables of figures that are printed to the terminal and written to the documents."""

from typing import NamedTuple

from rich.table import Table

ATTENTION_CONTENDERS = {"jaxmoe": "jaxmoe", "cudnn": "cuDNN", "xla": "XLA", "torch": "torch"}
MOE_CONTENDERS = {
    "jaxmoe": "jaxmoe",
    "xla": "XLA",
    "ragged": "ragged_dot",
    "dense": "dense",
    "transformers": "transformers",
}
LONGEST = {"longest": "longest group alone"}  # jaxmoe with the tokens of the longest group only
ROUTINGS = ("balanced", "random", "skewed", "worst")


class Grid(NamedTuple):
    """A table of figures: the titles of its columns, and rows of texts."""

    columns: tuple[str, ...]
    rows: list[list[str]]


def for_terminal(grid: Grid, title: str) -> Table:
    """A grid as a table for the terminal."""
    table = Table(title=title)
    for column in grid.columns:
        name = column == "case"
        table.add_column(column, justify="left" if name else "right", no_wrap=name)
    for row in grid.rows:
        table.add_row(*row)
    return table


def schedule_grids(figures: dict) -> list[Grid]:
    """The tables of a run of `jaxmoe benchmark schedule`: of its kernels, and of its steps."""
    if "core" in figures:
        return [bundles_grid(figures), tpu_steps_grid(figures), operations_grid(figures)]
    return [schedule_grid(figures), steps_grid(figures)]


def schedule_errors(figures: dict) -> list[str]:
    """A line for each reason why kernels or steps have no figures."""
    names: dict[str, list[str]] = {}
    for each in (*figures["kernels"], *figures["steps"]):
        if "error" in each:
            names.setdefault(each["error"], []).append(each["name"])
    return [f"{', '.join(of_error)}: {error}" for error, of_error in names.items()]


def bundles_grid(figures: dict) -> Grid:
    """A table with a row for each path through a TPU kernel's hot loop, and its bound."""
    rows = []
    for kernel in figures["kernels"]:
        for path in kernel.get("paths", []):
            name = ", ".join(filter(None, (kernel["kernel"], path["name"])))
            by = f"{kernel['by']}{', one core' if kernel['one_core'] else ''}"
            cycles = [f"{n:.0f}" if n else "" for n in path["cycles"].values()]
            rows.append([name, by, kernel["block"], *cycles, *_of_path(path)])
    columns = "bundles", "products", "memory", "busiest unit", "spills", "bound by"
    return Grid(("kernel", "by", "block", *columns, "TB/s", "TFLOP/s"), rows)


def _of_path(path: dict) -> list[str]:
    unit, flops = path["busiest"], path["product_rate"]
    return [
        f"{unit} {path['units'][unit]:.0f}",
        str(path["spills"]),
        path["bound_by"],
        "" if flops else f"{path['read_rate'] / 1e12:.2f}",
        f"{flops / 1e12:.0f}" if flops else "",
    ]


def schedule_grid(figures: dict) -> Grid:
    """A table with a row for each hot loop: cycles of an iteration by resource, and its bound."""
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
    """A table with a row for each step: the device operations that a further layer adds."""
    names = {kind for step in figures["steps"] for kind in step["a_layer"]}
    kinds = sorted(names, key=lambda kind: (-figures["steps"][0]["a_layer"].get(kind, 0), kind))
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


def tpu_steps_grid(figures: dict) -> Grid:
    """A table with a row for each TPU step: what a further layer adds, and the plan's bound."""
    kinds = {"custom-call": "kernels", "fusion": "fusions", "copy": "copies", "slice": "slices"}
    kinds |= {"all-reduce": "all-reduces", "while": "loops"}
    rows = []
    for step in (x for x in figures["steps"] if "error" not in x):
        counts, seconds = step["a_layer"], step["seconds"]
        others = sum(count for kind, count in counts.items() if kind not in kinds)
        numbers = [sum(counts.values()), *(counts.get(kind, 0) for kind in kinds), others]
        amounts = [f"{1e6 * seconds[x]:.1f}" for x in ("operations", "between", "plan")]
        ratio = (seconds["operations"] + seconds["between"]) / seconds["plan"]
        numbers = [f"{x:g}" for x in (*numbers, step["pool_copies"])]
        rows.append([_tpu_step(step), *numbers, *amounts, f"{ratio:.2f}"])
    names = "operations a layer", *kinds.values(), "scalars and others", "copies of page pools"
    return Grid(("step", *names, "us", "us between", "us of the plan", "of the plan"), rows)


def operations_grid(figures: dict) -> Grid:
    """A table with a row for each of the most expensive operations of the TPU steps."""
    rows = [
        [
            _tpu_step(step), each["operation"], each["source"], f"{each['a_layer']:g}",
            f"{each['bundles']:,.0f}{'+' if each['loops'] else ''}", f"{each['nbytes'] / 1e6:.2f}",
            f"{1e6 * each['seconds']:.2f}",
        ]
        for step in figures["steps"]
        for each in step.get("most_expensive", [])
    ]  # fmt: skip
    names = "operation", "source", "a layer", "bundles", "MB", "us"
    return Grid(("step", *names), rows)


def _tpu_step(step: dict) -> str:
    new = f"{step['tokens']:,} of " if step.get("tokens", 1) > 1 else ""
    return f"{step['model']}, {step['slice']}, {new}{step['context'] // 10**6}M"


def ceilings_text(figures: dict) -> str:
    """The device's rates in a large matrix product and a large copy, as text."""
    ceilings = figures["ceilings"]
    return f"{ceilings['TFLOP/s']:.0f} TFLOP/s and {ceilings['TB/s']:.2f} TB/s"


def attention_grid(figures: dict) -> Grid:
    """A table of the rates of each attention case by contender; n/a where there is no figure."""
    first, *others = ATTENTION_CONTENDERS.values()
    rows = []
    for case in figures["cases"]:
        (unit,) = case["work"]
        ours, *theirs = (_rate(case["rates"][name], unit) for name in ATTENTION_CONTENDERS)
        rows.append([case["name"], unit, ours, _ratio(case["of_ceiling"]), *theirs])
    return Grid(("case", "unit", first, "of ceiling", *others), rows)


def moe_grid(figures: dict) -> Grid:
    """A table of the time and rates of each case of experts, and of the other libraries' times."""
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
    """A table of jaxmoe's times by routing, with their ratios to the longest group's time alone."""
    by_case: dict[str, dict[str, dict]] = {}
    for case in figures["cases"]:
        by_routing = by_case.setdefault(case["name"].replace(f"-{case['routing']}", ""), {})
        by_routing[case["routing"]] = case["seconds"]
    rows = [
        [name, *(_skewed(by_routing.get(routing)) for routing in ROUTINGS), _worst(by_routing)]
        for name, by_routing in by_case.items()
        if len(by_routing) > 1
    ]
    return Grid(("case", *ROUTINGS, "worst / balanced"), rows)


def step_grid(figures: dict) -> Grid:
    """A table with a row for each batch size: rates, and times beside the plan's."""
    rows = []
    for batch in figures["batches"]:
        prefill, decode, count = batch["prefill"], batch["decode"], batch["rows"]
        last, estimate = prefill["seconds"][-1], decode.get("estimate")
        rows.append([
            str(count),
            f"{count * batch['prefill_chunk'] / last:,.0f}",
            f"{prefill['bound'] / last:.0%}" if "bound" in prefill else "",
            f"{decode['seconds'] * 1e3:.2f}",
            f"{estimate * 1e3:.2f}" if estimate else "",
            f"{count / decode['seconds']:,.1f}",
        ])  # fmt: skip
    names = ("rows", "prefill tokens/s", "of bound", "decode ms", "estimate", "decode tokens/s")
    return Grid(names, rows)


def engine_grid(figures: dict) -> Grid:
    """A table with a row for each workload and number of rows, and for transformers beside them."""
    rows = []
    for workload in figures["workloads"]:
        name, theirs = workload["workload"], workload["transformers"]
        rows += [_engine_row(name, side) for side in workload["engine"]]
        if theirs:
            row = [f"{name}, transformers", f"{theirs['tokens_per_second']:,.1f}"]
            rows.append(row + [""] * 6)
    names = ("tokens/s", "times faster", "first token s", "slots a token", "drafts right by place")
    names += ("host ms a step",)
    return Grid(("case", *names, "programs"), rows)


def _engine_row(workload: str, side: dict) -> list[str]:
    first = side["first_token_seconds"]
    drafts = side.get("accepted", []), side.get("drafted", [])
    return [
        f"{workload}, {side['rows']} rows",
        f"{side['tokens_per_second']:,.1f}",
        f"{side['times_faster']:.1f}" if "times_faster" in side else "",
        f"{first['median']:.2f} ({first['p90']:.2f})",
        f"{side['slots_a_token']:.2f}",
        ", ".join(f"{x / y:.0%}" for x, y in zip(*drafts, strict=True)),
        f"{1e3 * side['host_seconds_a_step']:.1f}",
        str(side["step_programs"]),
    ]


def identical_text(figures: dict) -> str:
    """How many answers are the same as those of transformers, as text; empty if it did not run."""
    sides = [side for workload in figures["workloads"] for side in workload["engine"]]
    shares = [side["identical"] for side in sides if "identical" in side]
    return f"{min(shares):.0%} or more of the answers are the same tokens" if shares else ""


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


def markdown(grid: Grid) -> str:
    """A grid as a table of Markdown."""
    rows = [grid.columns, ["---"] * len(grid.columns), *grid.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
