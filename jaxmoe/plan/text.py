"""Prints a plan as tables."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from jaxmoe.plan.drafts import DraftedStep
from jaxmoe.plan.planner import GIB, Plan, notes

MAY_BE_NONE = ("optimizer", "cache", "features", "head", "gradients", "activations")
WITH_THEM = "(in temporaries)"  # what the compiler does not tell apart


def print_plan(plan: Plan, drafted: Sequence[DraftedStep] = ()) -> None:
    """Prints a plan's mesh, memory, speed and notes to the terminal, and steps with drafts."""
    console, work = Console(width=100, highlight=False), plan.work
    console.print(
        f"[bold]{plan.model}[/bold] on {plan.target.name}: {work.task}, {work.rows} x "
        f"{work.context:,} tokens, {work.weights} weights, {work.kv} cache\n"
        f"mesh [bold]{plan.chosen.mesh}[/bold]: {plan.reason}",
        soft_wrap=True,
    )
    console.print(memory_table(plan))
    console.print(speed_table(plan))
    if drafted:
        console.print(drafts_table(drafted))
    verdict = "fits" if plan.fits else "[bold]does not fit[/bold]"
    console.print(
        f"It {verdict}; the largest context on this mesh is {plan.largest_context:,} tokens a row."
    )
    for line in notes(plan):
        console.print(line, style="dim", soft_wrap=True)


def memory_table(plan: Plan) -> Table:
    """A table of GiB on a device by use: by formula, and by the compiler if it was asked."""
    table = _table("memory of a device, GiB", "formula")
    memory, compiled, target = plan.chosen.memory, plan.compiled, plan.target
    rows = {
        "weights": (memory.weights, compiled and compiled.weights),
        "cache": (memory.cache, compiled and compiled.cache),
        "optimizer": (memory.optimizer, compiled and compiled.optimizer),
        "features": (memory.features, compiled and memory.features),
        "head": (memory.head, compiled and memory.head),
        "gradients": (memory.gradients, None),
        "activations": (memory.activations, None),
        "temporaries": (
            memory.temporaries,
            compiled and _rest(compiled, memory.features + memory.head),
        ),
        "peak": (memory.peak, compiled and compiled.peak),
        "limit": (target.limit, compiled and target.limit),
        "free": (target.limit - memory.peak, compiled and target.limit - compiled.peak),
    }
    if compiled:
        table.add_column("compiler", justify="right")
        table.add_column("difference", justify="right")
    for name, (formula, by_compiler) in rows.items():
        if not formula and name in MAY_BE_NONE:
            continue
        cells = [f"{formula / GIB:.2f}"]
        if compiled:
            percent = f"{plan.difference_percent:+.2f} %" if name == "peak" else ""
            cells += [WITH_THEM if by_compiler is None else f"{by_compiler / GIB:.2f}", percent]
        table.add_row(name, *cells, end_section=name == "temporaries")
    return table


def _rest(compiled, beside: int) -> int:
    return compiled.peak - compiled.weights - compiled.cache - compiled.optimizer - beside


def speed_table(plan: Plan) -> Table:
    """A table of what one step moves and computes on a device, and the least time for each."""
    table = _table(f"a step of {plan.tokens:,} token(s)", "a device")
    table.add_column("ms at least", justify="right")
    demand, bounds = plan.chosen.demand, plan.chosen.bounds
    inside, between = demand.sent(plan.target.devices_a_host)
    sent = f"{(inside + between) / 2**20:.1f} MiB sent"
    if plan.target.hosts > 1:
        sent += f", {between / 2**20:.1f} to other hosts"
    rows = {
        "memory": (f"{(demand.weights + demand.cache) / GIB:.2f} GiB read", bounds.memory),
        "compute": (f"{demand.flops / 1e12:.2f} TFLOP", bounds.compute),
        "communication": (sent, bounds.communication),
    }
    for name, (amount, seconds) in rows.items():
        binds = " (binds)" if name == bounds.binds else ""
        table.add_row(name + binds, amount, f"{1e3 * seconds:.3g}")
    if plan.scheduled:
        table.add_row("memory, by the compiler's schedule", "", f"{1e3 * plan.scheduled:.3g}")
    if plan.chosen.launches:
        table.add_row("launches, beside any of them", "", f"{1e3 * plan.chosen.launches:.3g}")
        table.add_row("estimate", "", f"{1e3 * plan.estimate:.3g}")
    rate = plan.tokens / bounds.seconds
    table.add_row("tokens/s at most", "", f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}")
    return table


def drafts_table(drafted: Sequence[DraftedStep]) -> Table:
    """A table of steps that try drafts, and of what a head takes to make them."""
    guessed = any(step.guessing for step in drafted)
    columns = "ms", *(["guessing"] * guessed), "times a step without", "right drafts needed"
    table = _table("drafts of a row", *columns)
    for column in ("tokens a step", "as fast") if drafted[0].tokens is not None else ():
        table.add_column(column, justify="right")
    for step in drafted:
        needed = "never pays" if step.needed is None else f"{step.needed:.0%}"
        seconds = (step.seconds, step.guessing) if guessed else (step.seconds,)
        cells = [*(f"{1e3 * x:.3g}" for x in seconds), f"{step.times:.2f}", needed]
        cells += [f"{x:.2f}" for x in (step.tokens, step.faster) if x is not None]
        table.add_row(str(step.drafts), *cells)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
