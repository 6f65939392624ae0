"""Searches the meshes that a number of devices can form for the best one."""

import dataclasses
import functools
from collections.abc import Iterator

from jaxmoe.errors import UserError
from jaxmoe.mesh import AXES, MeshConfig
from jaxmoe.plan.launches import launch_seconds
from jaxmoe.plan.memory import STEP, Memory, largest_context, memory, peak_at
from jaxmoe.plan.speed import Bounds, Demand, bounds, demand
from jaxmoe.plan.targets import Target, known_names, parse_target
from jaxmoe.plan.work import Work, check_mesh


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh with a step's memory, demand and bounds on it.

    Attributes:
        launches: seconds that a step takes between operations, as of `launch_seconds`.
    """

    mesh: MeshConfig
    memory: Memory
    demand: Demand
    bounds: Bounds
    launches: float

    def fits(self, target: Target) -> bool:
        """Whether the peak memory is within the target's limit."""
        return self.memory.peak <= target.limit

    @property
    def estimate(self) -> float:
        """Estimated seconds of a step: the bound plus the launches, which overlap with nothing."""
        return self.bounds.seconds + self.launches

    @property
    def rank(self) -> tuple:
        """A sort key, lower is better: the estimate, then tie-breakers.

        Ties are broken by the sum of all three bounds, peak bytes, and the number of axes used.
        """
        sizes = dataclasses.astuple(self.mesh)
        axes = sum(size > 1 for size in sizes)
        return self.estimate, self.bounds.total, self.memory.peak, axes, sizes


def candidate(work: Work, mesh: MeshConfig, target: Target) -> Candidate:
    """Computes a step's memory, demand and bounds on a mesh, by formula."""
    needs, launches = demand(work, mesh, target), launch_seconds(work, mesh, target)
    return Candidate(mesh, memory(work, mesh, target), needs, bounds(target, needs), launches)


def meshes(devices: int) -> Iterator[MeshConfig]:
    """Yields every mesh of this many devices."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]

    def sizes(left: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (left,)
            return
        for size in divisors:
            if left % size == 0:
                yield from ((size, *rest) for rest in sizes(left // size, axes - 1))

    for axis_sizes in sizes(devices, len(AXES)):
        yield MeshConfig(**dict(zip(AXES, axis_sizes, strict=True)))


def dividing(work: Work, devices: int) -> list[MeshConfig]:
    """The meshes of this many devices whose axes divide the model's parameters."""
    return [mesh for mesh in meshes(devices) if divides(work, mesh)]


def divides(work: Work, mesh: MeshConfig) -> bool:
    """Whether the mesh's axes divide the model's parameters."""
    try:
        check_mesh(work, mesh)
    except UserError:
        return False
    return True


@functools.lru_cache(maxsize=64)
def candidates(work: Work, target: Target) -> tuple[Candidate, ...]:
    """A candidate for each mesh of the target's devices that divides the model.

    Raises:
        UserError: if there is none.
    """
    result = tuple(candidate(work, mesh, target) for mesh in dividing(work, target.devices))
    if not result:
        raise UserError(
            f"no mesh of {target.devices} devices divides the model; choose a target whose number "
            "of devices has only factors of its heads, experts and widths."
        )
    return result


def best(work: Work, target: Target) -> tuple[Candidate, str]:
    """The fastest mesh that fits, or if none fits the smallest; and the reason, in words."""
    choices = candidates(work, target)
    fitting = [x for x in choices if x.fits(target)]
    if not fitting:
        smallest = min(choices, key=lambda x: (x.memory.peak, *x.rank))
        return smallest, f"none of {len(choices)} dividing meshes fits; this one needs fewest bytes"
    chosen = min(fitting, key=lambda x: x.rank)
    figure = "estimate" if chosen.launches else "bound"
    return chosen, (
        f"of {len(choices)} dividing meshes {len(fitting)} fit, and this one has the shortest "
        f"{figure} for {work.task}, {1e3 * chosen.estimate:.3g} ms a step ({chosen.bounds.binds})"
    )


def longest(work: Work, target: Target) -> int:
    """The largest context that fits on any mesh of the target; 0 if none fits."""
    most, context = work.config.max_position_embeddings, 0
    full = {mesh: peak_at(work, mesh, target, most) for mesh in dividing(work, target.devices)}
    for mesh in sorted(full, key=lambda mesh: full[mesh]):
        # Searches only meshes that hold more than the best one so far.
        if (
            peak_at(work, mesh, target, min(most, context + STEP)) <= target.limit
            and context < most
        ):
            context = max(context, largest_context(work, mesh, target))
    return context


def nearest(work: Work, target: Target) -> tuple[Target, MeshConfig] | None:
    """A target and mesh that hold the work: the given target, else the smallest known; or None."""
    known = [parse_target(name) for name in known_names()]
    others = sorted(known, key=lambda x: (x.limit * x.devices, x.name))
    for choice in (target, *others):
        if dividing(work, choice.devices):
            fastest, _ = best(work, choice)
            if fastest.fits(choice):
                return choice, fastest.mesh
    return None
