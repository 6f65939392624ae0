"""What a collective costs on a mesh of several hosts: bytes over each kind of link, and latency.

Devices are numbered along the mesh's axes, the last one fastest, and hosts have consecutive ones:
the first axes of the mesh cross hosts.
"""

import dataclasses
import functools
import math

import numpy as np

from jaxmoe.mesh import AXES, MeshConfig
from jaxmoe.plan.targets import Target


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of a step that are alike.

    Attributes:
        kind: "all-reduce", "all-gather", "reduce-scatter" or "all-to-all".
        axes: the mesh axes over whose devices each runs.
        nbytes: of one's whole array: what each device has before it, after an all-gather.
        count: how many a step has.
    """

    kind: str
    axes: tuple[str, ...]
    nbytes: int
    count: int = 1

    def sent(self, mesh: MeshConfig, devices_a_host: int | None = None) -> tuple[float, float]:
        """Bytes that a device sends for all of them: within its host, and to other hosts.

        Devices of a host add up or share theirs before and after each sends its part to other
        hosts; in an all-to-all each sends its own.

        Args:
            mesh: the devices.
            devices_a_host: None for one host of all of them.
        """
        devices, hosts = spread(mesh, self.axes, devices_a_host or math.prod(_sizes(mesh)))
        here = devices / hosts
        if self.kind == "all-to-all":
            inside, outside = (here - 1) / devices, (devices - here) / devices
        else:
            passes = 2 if self.kind == "all-reduce" else 1
            inside, outside = passes * (here - 1) / here, passes * (hosts - 1) / hosts / here
        total = self.count * self.nbytes
        return inside * total, outside * total

    def latency(self, mesh: MeshConfig, target: Target) -> float:
        """Seconds that all of them take whatever their bytes."""
        _, hosts = spread(mesh, self.axes, target.devices_a_host)
        doublings = math.ceil(math.log2(hosts))
        return self.count * (target.latency + doublings * target.latency_between)

    def seconds(self, mesh: MeshConfig, target: Target) -> float:
        """Seconds of all of them by the slowest link that they use, latency apart."""
        inside, outside = self.sent(mesh, target.devices_a_host)
        return max(inside / target.interconnect, outside / target.between)


@functools.cache
def spread(mesh: MeshConfig, axes: tuple[str, ...], devices_a_host: int) -> tuple[int, int]:
    """The devices of a collective over mesh axes, and the hosts that they are on, at most."""
    groups = groups_of(mesh, axes)
    hosts = np.sort(groups // devices_a_host, axis=1)
    return groups.shape[1], 1 + int((np.diff(hosts, axis=1) > 0).sum(axis=1).max(initial=0))


def groups_of(mesh: MeshConfig, axes: tuple[str, ...]) -> np.ndarray:
    """The numbers of the devices that run a collective together [groups, devices]."""
    grid = np.arange(math.prod(_sizes(mesh))).reshape(_sizes(mesh))
    inner = [i for i, axis in enumerate(AXES) if axis in axes]
    grid = np.moveaxis(grid, inner, range(-len(inner), 0))
    return grid.reshape(-1, math.prod(_sizes(mesh)[i] for i in inner))


def crossing(mesh: MeshConfig, devices_a_host: int) -> list[str]:
    """The mesh axes whose devices are on several hosts."""
    return [axis for axis in AXES if spread(mesh, (axis,), devices_a_host)[1] > 1]


def _sizes(mesh: MeshConfig) -> tuple[int, ...]:
    return dataclasses.astuple(mesh)
