"""How many of a step's tokens each device of a mesh has, and how they meet the experts."""

import dataclasses
import functools
import math

from jaxmoe.mesh import MeshConfig, activation_axes
from jaxmoe.model.moe import exchange_way
from jaxmoe.plan.work import Work, abstract_mesh


@dataclasses.dataclass(frozen=True)
class Spread:
    """One device's share of a step.

    Attributes:
        rows: of the batch.
        length: new tokens of each of its rows.
        group: tokens that its experts choose from: those of all devices of the `expert` axis.
        heads: query heads.
        kv_heads: key heads.
        way: how tokens and experts meet, as `jaxmoe.model.moe.exchange_way` says it.
    """

    rows: int
    length: int
    group: int
    heads: int
    kv_heads: int
    way: str

    @property
    def tokens(self) -> int:
        """New tokens."""
        return self.rows * self.length


@functools.cache
def spread(work: Work, mesh: MeshConfig) -> Spread:
    """What lands on each device: rows or tokens that an axis does not divide are on all of it."""
    abstract, config = abstract_mesh(mesh), work.config
    batch = activation_axes(abstract, "batch", work.rows)
    length = activation_axes(abstract, "length", work.tokens)
    rows = work.rows // math.prod(abstract.shape[axis] for axis in batch)
    tokens = work.tokens // math.prod(abstract.shape[axis] for axis in length)
    way = exchange_way(abstract, (work.rows, work.tokens, config.hidden_size))
    return Spread(
        rows=rows,
        length=tokens,
        group=rows * tokens * (1 if way == "stay" else mesh.expert),
        heads=config.num_attention_heads // mesh.tensor,
        kv_heads=config.num_key_value_heads // mesh.tensor,
        way=way,
    )
