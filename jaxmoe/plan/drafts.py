"""What drafts bring by the bounds: how long a step takes that tries some, and when that pays.

A step that tries k drafts has k + 1 tokens a row. It reads each row's keys once, and more experts.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.generation.drafts import most_drafts
from jaxmoe.plan import search
from jaxmoe.plan.head import guess_seconds
from jaxmoe.plan.planner import Plan


@dataclasses.dataclass(frozen=True)
class DraftedStep:
    """A step of decoding that tries drafts.

    Attributes:
        drafts: of each row.
        seconds: as `Plan.estimate`, with `guessing`.
        guessing: what a head takes to make them; 0 without one.
        times: the seconds over those of a step without drafts.
        needed: how likely a draft after right ones has to be right, all alike, so that a token
            takes no longer than without; None if it does in any case.
        tokens: of a row in a step, if drafts are right as often as said; None if nothing was said.
    """

    drafts: int
    seconds: float
    guessing: float
    times: float
    needed: float | None
    tokens: float | None

    @property
    def faster(self) -> float | None:
        """How many times as fast as without drafts tokens come."""
        return None if self.tokens is None else self.tokens / self.times


def drafted_steps(plan: Plan, most: int, accepted: Sequence[float] = ()) -> list[DraftedStep]:
    """Steps with 1 to `most` drafts on a plan's mesh.

    Args:
        plan: of decoding.
        accepted: how likely the first, second, ... draft is right where those before it are, as
            `Result.drafted` and `Result.accepted` count; fewer than `most` go on with the last.

    Raises:
        UserError: for another task, fewer drafts than 1 or more than a row has on the target, or
            shares that are none.
    """
    if plan.work.task != "decode":
        raise UserError(f"--drafts goes with --task decode, not {plan.work.task}.")
    if most < 1:
        raise UserError(f"--drafts {most} is below 1.")
    allowed = most_drafts(plan.work.config, plan.target.platform)
    if allowed is not None and most > allowed:
        raise UserError(
            f"--drafts {most}: a row has at most {allowed} on {plan.target.name}; give fewer, or "
            "leave it out."
        )
    if not all(0 <= share <= 1 for share in accepted):
        raise UserError(f"--accepted {','.join(map(str, accepted))} has shares beyond 0 to 1.")
    return [_step(plan, count, accepted) for count in range(1, most + 1)]


def _step(plan: Plan, count: int, accepted: Sequence[float]) -> DraftedStep:
    work = dataclasses.replace(plan.work, task="prefill", prefill_chunk=count + 1)
    bounds = search.candidate(work, plan.chosen.mesh, plan.target).bounds
    guessing = guess_seconds(plan.work, plan.chosen.mesh, plan.target, count)
    seconds = bounds.seconds + (plan.estimate - plan.chosen.bounds.seconds) + guessing
    times = seconds / plan.estimate
    tokens = None
    if accepted:
        shares = [*accepted, *[accepted[-1]] * count][:count]
        tokens = 1 + float(np.cumprod(shares).sum())
    return DraftedStep(count, seconds, guessing, times, _needed(count, times), tokens)


def _needed(count: int, times: float) -> float | None:
    """The share p for which 1 + p + p^2 + ... + p^count is `times`."""
    if times > 1 + count:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        enough = (middle ** np.arange(count + 1)).sum() >= times
        low, high = (low, middle) if enough else (middle, high)
    return high


def to_json(steps: Sequence[DraftedStep]) -> list[dict[str, Any]]:
    """The steps as JSON values."""
    return [dataclasses.asdict(step) | {"faster": step.faster} for step in steps]
