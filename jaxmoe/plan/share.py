"""One device's share of a step: rows, tokens and heads, and how its tokens reach the experts."""

import dataclasses
import functools
import math

from jaxmoe.mesh import MeshConfig, activation_axes
from jaxmoe.model.moe import expert_exchange
from jaxmoe.plan.work import Work, abstract_mesh


@dataclasses.dataclass(frozen=True)
class DeviceShare:
    """One device's share of a step.

    Attributes:
        rows: rows of the batch on the device.
        length: new tokens of each of these rows on the device.
        between: tokens that the device keeps between recomputed layers.
        group: tokens that may reach the device's experts: those of all devices of its expert group.
        heads: query heads.
        kv_heads: key and value heads.
        exchange: how tokens reach their experts, as of `jaxmoe.model.moe.expert_exchange`.
    """

    rows: int
    length: int
    between: int
    group: int
    heads: int
    kv_heads: int
    exchange: str

    @property
    def tokens(self) -> int:
        """The number of new tokens on the device."""
        return self.rows * self.length


@functools.cache
def device_share(work: Work, mesh: MeshConfig) -> DeviceShare:
    """One device's share; rows or tokens are replicated over axes that do not divide them."""
    abstract, config = abstract_mesh(mesh), work.config
    batch = activation_axes(abstract, "batch", work.rows)
    length = activation_axes(abstract, "length", work.tokens)
    residual = activation_axes(abstract, "residual", work.tokens)
    rows = work.rows // math.prod(abstract.shape[axis] for axis in batch)
    tokens = work.tokens // math.prod(abstract.shape[axis] for axis in length)
    exchange = expert_exchange(abstract, (work.rows, work.tokens, config.hidden_size))
    return DeviceShare(
        rows=rows,
        length=tokens,
        between=rows * work.tokens // math.prod(abstract.shape[axis] for axis in residual),
        group=rows * tokens * (1 if exchange == "replicated" else mesh.expert),
        heads=config.num_attention_heads // mesh.tensor,
        kv_heads=config.num_key_value_heads // mesh.tensor,
        exchange=exchange,
    )
