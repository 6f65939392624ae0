"""What training keeps on one device from step to step: parameters, adapters, statistics.

They are the shapes and shardings of the trainer's own state (`jaxmoe.train.trainer.set_up`), of a
mesh of one device, whose shardings name the axes that divide them on any mesh.
"""

import collections
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.mesh import MeshConfig
from jaxmoe.model.params import abstract_params
from jaxmoe.plan.work import Work


class Kept(NamedTuple):
    """An array, and by which mesh axes each of its dimensions is divided."""

    shape: tuple[int, ...]
    itemsize: int
    axes: tuple[tuple[str, ...], ...]

    def size(self, mesh: MeshConfig) -> int:
        """The number of elements on one device."""
        sizes = dataclasses.asdict(mesh)
        parts = (math.prod(sizes[axis] for axis in axes) for axes in self.axes)
        return math.prod(n // part for n, part in zip(self.shape, parts, strict=True))


Group = dict[Kept, int]  # arrays that are alike, and how many there are


@dataclasses.dataclass(frozen=True)
class State:
    """The arrays of a run.

    Attributes:
        frozen: parameters that are not trained, as they are stored.
        trained: parameters that are, or their adapters.
        optimizer: the optimizer's statistics on devices.
        offloaded: those that lie in the host's memory between steps.
        adapted: the names of the matrices with an adapter, such as `layers.3.attention.q`.
    """

    frozen: Group
    trained: Group
    optimizer: Group
    offloaded: Group
    adapted: frozenset[str]


def state_of(work: Work) -> State:
    """The arrays that a run keeps; they depend on neither rows nor context."""
    return _state(dataclasses.replace(work, rows=1, context=1, tiles=0))


@functools.cache
def _state(work: Work) -> State:
    from jaxmoe.train.trainer import set_up  # which imports this package's models

    mesh = MeshConfig().make(jax.devices()[:1])
    stored = abstract_params(work.config, mesh, jnp.bfloat16, work.format, pads=False)
    setup = set_up(work.training, work.config, mesh, "the run", None, no_batch, stored)
    statistics = jax.tree.leaves(setup.abstract.optimizer)
    on_host = [x for x in statistics if x.sharding.memory_kind == "pinned_host"]
    on_device = [x for x in statistics if x.sharding.memory_kind != "pinned_host"]
    return State(
        frozen=_group(setup.frozen),
        trained=_group(setup.abstract.params),
        optimizer=_group(on_device),
        offloaded=_group(on_host),
        adapted=frozenset() if setup.plan is None else frozenset(setup.plan.ranks),
    )


def no_batch(number: int) -> Any:
    """The batches of a run whose step is only planned or compiled."""
    raise AssertionError("a step that is only planned reads nothing")


def _group(tree: Any) -> Group:
    return collections.Counter(map(_kept, jax.tree.leaves(tree)))


def _kept(x: Any) -> Kept:
    spec = (*x.sharding.spec, *(None for _ in range(len(x.shape) - len(x.sharding.spec))))
    axes = tuple((axis,) if isinstance(axis, str) else tuple(axis or ()) for axis in spec)
    return Kept(x.shape, x.dtype.itemsize, axes)


def nbytes(group: Group, mesh: MeshConfig) -> int:
    """Bytes of arrays on one device of a mesh."""
    return sum(count * x.itemsize * x.size(mesh) for x, count in group.items())


def numbers(group: Group, mesh: MeshConfig) -> int:
    """How many elements arrays have on one device of a mesh."""
    return sum(count * x.size(mesh) for x, count in group.items())
