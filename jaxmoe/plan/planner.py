"""Plans a step on a target: the mesh, the memory it needs, whether it fits, bounds on its speed."""

import dataclasses
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.params import num_params
from jaxmoe.plan import search
from jaxmoe.plan.links import crossing
from jaxmoe.plan.memory import largest_context
from jaxmoe.plan.scheduled import schedule_factor
from jaxmoe.plan.search import Candidate
from jaxmoe.plan.targets import Target
from jaxmoe.plan.vision import check_tiles, image_tokens
from jaxmoe.plan.work import Work, check_mesh

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of one step.

    Attributes:
        model: the model's name.
        work: the step.
        target: the hardware.
        chosen: the mesh, with memory and speed by formula.
        reason: why this mesh was chosen, in words.
        largest_context: the most tokens per row that fit on the mesh.
        compiled: the figures of the compiler, a `jaxmoe.plan.compiled.Compiled`; None if it was
            not asked.
    """

    model: str
    work: Work
    target: Target
    chosen: Candidate
    reason: str
    largest_context: int
    compiled: Any = None  # untyped, since importing its module imports the compilers

    @property
    def peak(self) -> int:
        """Peak bytes on a device: the compiler's figure, or the formula's if it was not asked."""
        return self.compiled.peak if self.compiled else self.chosen.memory.peak

    @property
    def fits(self) -> bool:
        """Whether the peak is within the target's limit."""
        return self.peak <= self.target.limit

    @property
    def difference_percent(self) -> float | None:
        """How many percent the formula's peak is above the compiler's; None if not compiled."""
        if not self.compiled:
            return None
        return 100 * (self.chosen.memory.peak / self.compiled.peak - 1)

    @property
    def estimate(self) -> float:
        """Estimated seconds of a step: the bound plus the launches, which overlap with nothing."""
        return self.chosen.estimate

    @property
    def scheduled(self) -> float | None:
        """Seconds of a step on TPUs by the compiler's schedule, communication apart, or None."""
        factor = schedule_factor(self.work, self.chosen.mesh, self.target)
        return factor and factor * self.chosen.bounds.memory

    @property
    def tokens(self) -> int:
        """The number of new tokens in a step, over all rows."""
        return self.work.rows * self.work.tokens


def make_plan(model: str, work: Work, target: Target, mesh: MeshConfig | None) -> Plan:
    """Plans a step by formula.

    Args:
        model: the model's name, for messages.
        work: the step.
        target: the hardware.
        mesh: the mesh; None for the best one.

    Raises:
        UserError: if the mesh does not match the target's devices or does not divide the model, or
            the tiles are more tokens than the context.
    """
    check_tiles(work)
    if mesh is None:
        chosen, reason = search.best(work, target)
    else:
        mesh = resolved(mesh, target)
        check_mesh(work, mesh)
        chosen, reason = search.candidate(work, mesh, target), "as asked for"
    return Plan(
        model=model,
        work=work,
        target=target,
        chosen=chosen,
        reason=reason,
        largest_context=largest_context(work, chosen.mesh, target),
    )


def with_longest_context(work: Work, target: Target, mesh: MeshConfig | None) -> Work:
    """The work with the largest context that fits; unchanged if none fits.

    Args:
        work: the step.
        target: the hardware.
        mesh: the mesh; None for the one that holds most.
    """
    if mesh is None:
        context = search.longest(work, target)
    else:
        mesh = resolved(mesh, target)
        check_mesh(work, mesh)
        context = largest_context(work, mesh, target)
    return dataclasses.replace(work, context=context) if context else work


def resolved(mesh: MeshConfig, target: Target) -> MeshConfig:
    """The mesh with an axis of -1 replaced by its size.

    Raises:
        UserError: if it does not form all of the target's devices.
    """
    try:
        return mesh.resolve(target.devices)
    except UserError:
        raise UserError(
            f"mesh {mesh} does not form the {target.devices} device(s) of {target.name}; change "
            "its sizes, or use --mesh auto."
        ) from None


def with_compiler(plan: Plan) -> Plan:
    """The plan with the figures of the target's compiler added; takes minutes."""
    from jaxmoe.plan.compiled import compile_step  # imports the compilers

    compiled = compile_step(plan.work, plan.chosen.mesh, plan.target)
    return dataclasses.replace(plan, compiled=compiled)


def check_fits(plan: Plan) -> None:
    """Raises a UserError if the plan does not fit; it names the shortage and what would hold it."""
    if plan.fits:
        return
    work, limit = plan.work, plan.target.limit
    nearest = search.nearest(work, plan.target)
    advice = "no known target holds it"
    if nearest is not None:
        target, mesh = nearest
        advice = f"--target {target.name} --mesh {mesh} holds it"
    fewer = (
        f"at most {plan.largest_context} tokens of context fit"
        if plan.largest_context
        else ("no context fits")
    )
    raise UserError(
        f"{plan.model} with a context of {work.context} needs {plan.peak / GIB:.1f} GiB a device "
        f"on mesh {plan.chosen.mesh} of {plan.target.name}, {(plan.peak - limit) / GIB:.1f} GiB "
        f"more than the {limit / GIB:.1f} GiB there are: {fewer}, and {advice}."
    )


def notes(plan: Plan) -> list[str]:
    """Sentences that explain a plan's assumptions, to print below its figures."""
    target = plan.target
    reserve = target.memory - target.limit
    lines = [
        f"{reserve / GIB:.1f} GiB a device are kept {target.reserve_reason}.",
        "Times are bounds at published rates, with everything overlapped; nothing was measured.",
    ]
    if plan.work.tiles:
        lines.append(
            f"{plan.work.tiles} tile(s) of images take {image_tokens(plan.work)} tokens of the "
            "context, besides their separators."
        )
    if target.hosts > 1:
        axes = crossing(plan.chosen.mesh, target.devices_a_host)
        lines.append(
            f"Hosts have {target.devices_a_host} devices each, in the order of the mesh, so that "
            f"links between hosts carry {' and '.join(axes)}: {target.between / 1e9:.3g} GB/s a "
            "device."
        )
    if plan.chosen.launches:
        between = f", {1e6 * target.latency_between:.0f} us more for each doubling of its hosts"
        lines.append(
            f"A launch is assumed to take {1e6 * target.launch:.1f} us, a small sum over devices "
            f"{1e6 * target.latency:.0f} us{between if target.hosts > 1 else ''}; how many there "
            "are is the compiler's count."
        )
    if plan.scheduled:
        lines.append(
            "The schedule is the compiler's, of Scout with one row and this format of the cache, "
            "and not a measurement: it counts no stalls and no communication."
        )
    if target.compiler in ("a100", "l40s", "b200"):
        lines.append("The kernels for Hopper do not run there, XLA's and JAX's own do.")
    if target.is_tpu or target.compiler in ("a100", "l40s", "b200"):
        lines.append("Temporaries by formula are those of Hopper's kernels.")
    return lines


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values, in bytes and seconds; memory and demand are those of one device."""
    work, chosen, target = plan.work, plan.chosen, plan.target
    bounds, demand = chosen.bounds, chosen.demand
    inside, between = demand.sent(target.devices_a_host)
    return {
        "model": plan.model,
        "parameters": num_params(work.config),
        "task": work.task,
        "context": work.context,
        "batch": work.rows,
        "tokens_a_step": plan.tokens,
        "tiles": work.tiles,
        "weights": work.weights,
        "kv": work.kv,
        "target": {**dataclasses.asdict(target), "limit": target.limit},
        "mesh": str(chosen.mesh),
        "mesh_reason": plan.reason,
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "free_bytes": target.limit - plan.peak,
        "largest_context": plan.largest_context,
        "formula": {**dataclasses.asdict(chosen.memory), "peak": chosen.memory.peak},
        "compiled": plan.compiled
        and {
            **dataclasses.asdict(plan.compiled),
            "peak": plan.compiled.peak,
            "formula_difference_percent": plan.difference_percent,
        },
        "demand": {
            **{name: getattr(demand, name) for name in ("weights", "cache", "flops")},
            "sent": inside + between,
            "sent_between_hosts": between,
            "collectives": [dataclasses.asdict(x) for x in demand.collectives],
        },
        "seconds": {
            **dataclasses.asdict(bounds),
            "binds": bounds.binds,
            "step": bounds.seconds,
            "token": bounds.seconds / plan.tokens,
            "launches": chosen.launches,
            "estimate": plan.estimate,
            "scheduled": plan.scheduled,
        },
        "notes": notes(plan),
    }
