"""The tables of training's figures, as Markdown."""

from jaxmoe.benchmarks import tables


def train_markdown(figures: dict) -> str:
    """The figures of `jaxmoe benchmark train` as Markdown."""
    seconds, rate = figures["median_seconds"], figures["tokens_per_second"]
    versions, machine = figures["versions"], figures["machine"]
    return f"""\
| | jaxmoe | transformers | times faster |
|---|---|---|---|
| a step, s | {seconds["jaxmoe"]:.2f} | {seconds["transformers"]:.2f} \
| {figures["times_faster"]:.2f} |
| tokens/s | {rate["jaxmoe"]:.0f} | {rate["transformers"]:.0f} | |

{figures["parameters"] / 1e6:.0f}M random parameters, float32, AdamW, {figures["rows"]} rows of \
{figures["length"]} tokens, the same weights, tokens and first
loss on both sides; medians of {figures["repeats"]} steps taken in turn on {machine["cores"]} \
cores of an {machine["processor"]},
{figures["date"]}, jax {versions["jax"]}, torch {versions["torch"]}, transformers \
{versions["transformers"]}, which computes every expert for
every token. `make bench` measures it again; `scripts/tables.py` makes this table from
`benchmarks/train-cpu.json`."""


def train_memory_markdown(figures: list[dict]) -> str:
    """The figures of `scripts/train_memory.py` as Markdown."""
    title = "step of Scout", "target", "mesh", "rows x tokens"
    columns = (*title, "kept", "during the step", "together", "formula")
    return tables.markdown(tables.Grid(columns, list(map(_train_memory_row, figures))))


def _train_memory_row(figures: dict) -> list[str]:
    """GB of a device by the compiler, and by how much the formula's sum is off."""
    case, compiled = figures["case"], figures["compiled"]
    known = ("task", "layers", "target", "mesh", "rows", "context", "weights")
    options = [_option(name, value) for name, value in case.items() if name not in known]
    task = {"lora": "LoRA", "train": "all parameters"}[case["task"]]
    task = f"QLoRA, {case['weights']}" if "weights" in case else task
    kept = compiled["weights"] + compiled["optimizer"]
    percent = 100 * (sum(figures["formula"].values()) / compiled["peak"] - 1)
    return [
        ", ".join([task, f"{case['layers']} layers", *options]),
        case["target"],
        case["mesh"],
        f"{case['rows']} x {case['context']:,}",
        *(f"{x / 1e9:.1f}" for x in (kept, compiled["temporaries"], compiled["peak"])),
        f"{percent:+.1f} %",
    ]


def _option(name: str, value: object) -> str:
    """A run's setting in a few words."""
    if name == "adapter":
        return "adapters of experts too"
    return ", ".join(map(str, value.values())) if isinstance(value, dict) else f"{name}: {value}"
