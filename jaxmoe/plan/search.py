"""The meshes that a number of devices can form, and the best of them for a task."""

import dataclasses
import functools
from collections.abc import Iterator

from jaxmoe.errors import UserError
from jaxmoe.mesh import AXES, MeshConfig
from jaxmoe.plan.memory import STEP, Memory, largest_context, memory, peak_at
from jaxmoe.plan.speed import Bounds, Demand, bounds, demand
from jaxmoe.plan.targets import Target, known_names, parse_target
from jaxmoe.plan.work import Work, check_mesh


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh with what it needs on a target."""

    mesh: MeshConfig
    memory: Memory
    demand: Demand
    bounds: Bounds

    def fits(self, target: Target) -> bool:
        """Whether its peak is within the target's limit."""
        return self.memory.peak <= target.limit

    @property
    def rank(self) -> tuple:
        """Lower is better: the bound, then what can hide behind it, then bytes, then axes used."""
        sizes = dataclasses.astuple(self.mesh)
        axes = sum(size > 1 for size in sizes)
        return self.bounds.seconds, self.bounds.total, self.memory.peak, axes, sizes


def candidate(work: Work, mesh: MeshConfig, target: Target) -> Candidate:
    """By formula."""
    needs = demand(work, mesh)
    return Candidate(mesh, memory(work, mesh), needs, bounds(target, needs))


def meshes(devices: int) -> Iterator[MeshConfig]:
    """Every mesh of so many devices."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]

    def sizes(left: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (left,)
            return
        for size in divisors:
            if left % size == 0:
                yield from ((size, *rest) for rest in sizes(left // size, axes - 1))

    for found in sizes(devices, len(AXES)):
        yield MeshConfig(**dict(zip(AXES, found, strict=True)))


def dividing(work: Work, devices: int) -> list[MeshConfig]:
    """The meshes that divide the model's parameters."""
    return [mesh for mesh in meshes(devices) if divides(work, mesh)]


def divides(work: Work, mesh: MeshConfig) -> bool:
    """Whether a mesh divides the model's parameters."""
    try:
        check_mesh(work, mesh)
    except UserError:
        return False
    return True


@functools.lru_cache(maxsize=64)
def candidates(work: Work, target: Target) -> tuple[Candidate, ...]:
    """Of all dividing meshes.

    Raises:
        UserError: if there is none.
    """
    found = tuple(candidate(work, mesh, target) for mesh in dividing(work, target.devices))
    if not found:
        raise UserError(
            f"no mesh of {target.devices} devices divides the model; choose a target whose number "
            "of devices has only factors of its heads, experts and widths."
        )
    return found


def best(work: Work, target: Target) -> tuple[Candidate, str]:
    """The fastest mesh of those that fit, or the smallest if none does; and why it was chosen."""
    found = candidates(work, target)
    fitting = [each for each in found if each.fits(target)]
    if not fitting:
        smallest = min(found, key=lambda each: (each.memory.peak, *each.rank))
        return smallest, f"none of {len(found)} dividing meshes fits; this one needs fewest bytes"
    chosen = min(fitting, key=lambda each: each.rank)
    return chosen, (
        f"of {len(found)} dividing meshes {len(fitting)} fit, and this one has the shortest bound "
        f"for {work.task}, {1e3 * chosen.bounds.seconds:.3g} ms a step ({chosen.bounds.binds})"
    )


def longest(work: Work, target: Target) -> int:
    """The largest context that some mesh holds; 0 if none holds any."""
    most, found = work.config.max_position_embeddings, 0
    full = {mesh: peak_at(work, mesh, most) for mesh in dividing(work, target.devices)}
    for mesh in sorted(full, key=lambda mesh: full[mesh]):
        # Only a mesh that holds more than the best so far is worth a search.
        if peak_at(work, mesh, min(most, found + STEP)) <= target.limit and found < most:
            found = max(found, largest_context(work, mesh, target))
    return found


def nearest(work: Work, target: Target) -> tuple[Target, MeshConfig] | None:
    """What holds the work: the same target on another mesh, or the smallest other that does."""
    known = [parse_target(name) for name in known_names()]
    others = sorted(known, key=lambda each: (each.limit * each.devices, each.name))
    for each in (target, *others):
        if dividing(work, each.devices):
            found, _ = best(work, each)
            if found.fits(each):
                return each, found.mesh
    return None
