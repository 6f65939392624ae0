"""Writes docs/plan.md's table of plans from benchmarks/plan.json; with --plan, plans them first."""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIGURES, DOCUMENT = ROOT / "benchmarks" / "plan.json", ROOT / "docs" / "plan.md"
BEGIN, END = "<!-- plans -->", "<!-- /plans -->"
GIB = 2**30

# Model, target, weights, cache, context and task of each plan.
PLANS = (
    ("scout", "h100x8", "bf16", "int8", "10000000", "decode"),
    ("scout", "h100x8", "bf16", "int8", "10000000", "prefill"),
    ("scout", "h100x1", "int4", "int4", "max", "decode"),
    ("scout", "h200x1", "int4", "int8", "max", "decode"),
    ("scout", "h200x1", "int4", "int4", "max", "decode"),
    ("scout", "b200x8", "bf16", "bf16", "max", "decode"),
    ("scout", "v5p-16", "bf16", "int8", "max", "decode"),
    ("scout", "v6e-16", "bf16", "int8", "max", "decode"),
    ("scout", "v6e-64", "bf16", "bf16", "max", "decode"),
    ("maverick", "h100x8", "int4", "int8", "max", "decode"),
    ("maverick", "h200x8", "fp8", "bf16", "max", "decode"),
    ("maverick", "h200x8", "fp8", "bf16", "max", "prefill"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", action="store_true", help="plan all by formula first")
    parser.add_argument(
        "--compile", metavar="N", type=int, nargs="*", help="plan these with the compiler too"
    )
    args = parser.parse_args()
    if args.plan:
        _write([_planned(case) for case in PLANS])
    for number in args.compile or ():
        plans = json.loads(FIGURES.read_text())
        plans[number] = _planned(PLANS[number], compiles=True)
        _write(plans)
    DOCUMENT.write_text(filled(DOCUMENT.read_text(), json.loads(FIGURES.read_text())))


def _planned(case: tuple[str, ...], compiles: bool = False) -> dict:
    import jax

    from jaxmoe.plan import planner  # imports JAX, which writing the table does not need
    from jaxmoe.plan.models import read_model
    from jaxmoe.plan.targets import parse_target
    from jaxmoe.plan.work import Work

    jax.config.update("jax_platforms", "cpu")
    model, name, weights, kv, context, task = case
    config, target = read_model(model), parse_target(name)
    longest = config.max_position_embeddings
    work = Work(
        config=config,
        task=task,  # pyrefly: ignore  # a str that is one of the literals of Task
        context=longest if context == "max" else int(context),
        weights=weights,
        kv=kv,
    )
    if context == "max":
        work = planner.with_longest_context(work, target, None)
    plan = planner.make_plan(model, work, target, None)
    return planner.to_json(planner.with_compiler(plan) if compiles else plan)


def _write(plans: list[dict]) -> None:
    FIGURES.write_text(json.dumps(plans, indent=1) + "\n")


def filled(text: str, plans: list[dict]) -> str:
    """The document's text with its table replaced by one of these plans."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{markdown(plans)}\n{END}{rest.partition(END)[2]}"


def markdown(plans: list[dict]) -> str:
    """A Markdown table with a line for each plan."""
    columns = (
        "model, weights, cache",
        "target",
        "mesh",
        "task",
        "context",
        "weights",
        "cache",
        "temporaries",
        "peak",
        "compiler",
        "off by",
        "ms a step at least",
    )
    lines = [columns, ("---",) * len(columns), *map(_cells, plans)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(plan: dict) -> tuple[str, ...]:
    formula, compiled, seconds = plan["formula"], plan["compiled"], plan["seconds"]
    parts = (f"{formula[name] / GIB:.2f}" for name in ("weights", "cache", "temporaries", "peak"))
    by_compiler = ("not asked", "")
    if compiled:
        by_compiler = (
            f"{compiled['peak'] / GIB:.2f}",
            f"{compiled['formula_difference_percent']:+.2f} %",
        )
    return (
        f"{plan['model']}, {plan['weights']}, {plan['kv']}",
        plan["target"]["name"],
        plan["mesh"],
        plan["task"],
        f"{plan['context']:,}",
        *parts,
        *by_compiler,
        f"{1e3 * seconds['step']:.3g} ({seconds['binds']})",
    )
