"""What fits on which machine, before it is rented: python examples/plan.py [CHECKPOINT]."""

import sys

from jaxmoe.plan.models import read_model
from jaxmoe.plan.planner import make_plan
from jaxmoe.plan.targets import parse_target
from jaxmoe.plan.work import Work


def main(model: str = "scout") -> None:
    """Prints, for some targets, the best mesh to decode on, its memory and its speed."""
    for name in ("h100x8", "h200x8", "v5p-16"):
        target = parse_target(name)
        work = Work(config=read_model(model), context=2**16, rows=8, weights="int8", kv="int8")
        plan = make_plan(model, work, target, mesh=None)
        rate = f", up to {plan.tokens / plan.estimate:.0f} tokens/s" if plan.estimate else ""
        fits = "fits" if plan.fits else "does not fit"
        print(f"{name}, {plan.chosen.mesh}: {plan.peak / 1e9:.1f} GB a device {fits}{rate}")


if __name__ == "__main__":
    main(*sys.argv[1:])
