"""Sends rows to the devices that hold their experts and back, by a ragged all-to-all.

Each row goes to one device and nothing is dropped: the receive buffer of every device holds all
rows of all devices, the most that can arrive.

Shape letters: N rows on each device, P devices along the axis, D row width; room is P * N.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.experts.group_metadata import GroupMetadata, make_group_metadata
from pallas_kernels.experts.moves import combine, dispatch
from pallas_kernels.platform import target


class ExchangePlan(NamedTuple):
    """Which rows each device sends to which device.

    Attributes:
        order: this device's rows grouped by destination.
        counts: how many rows each device (first axis) sends to each device (second axis).
    """

    order: GroupMetadata
    counts: Int[Array, "P P"]


def plan_exchange(destination: Int[Array, "N"], axis: str | tuple[str, ...]) -> ExchangePlan:
    """Plans an exchange of rows; call it inside `jax.shard_map`, on every device of `axis`.

    Args:
        destination: the index along `axis` of the device that each row is sent to; P or more for
            a row that is not sent.
        axis: the mesh axes over which rows are exchanged.
    """
    order = make_group_metadata(destination, lax.axis_size(axis), 1)
    return ExchangePlan(order, lax.all_gather(order.group_sizes, axis))


def send(
    plan: ExchangePlan, x: Float[Array, "N D"], axis: str | tuple[str, ...]
) -> Float[Array, "room D"]:
    """Sends rows by the plan; returns those that this device received, then zeros.

    Received rows are in the order of the devices that they come from.
    """
    me = lax.axis_index(axis)
    room = jnp.zeros((plan.counts.shape[0] * x.shape[0], x.shape[1]), x.dtype)
    return _ragged_all_to_all(
        dispatch(plan.order, x),
        room,
        starts(plan.counts[me]),
        plan.counts[me],
        starts(plan.counts, 0)[me],
        plan.counts[:, me],
        axis,
    )


def send_back(
    plan: ExchangePlan, y: Float[Array, "room D"], axis: str | tuple[str, ...]
) -> Float[Array, "N D"]:
    """Returns received rows to the devices they came from, in their old order.

    The result is zero for rows that were not sent.
    """
    me = lax.axis_index(axis)
    room = jnp.zeros((plan.order.row_of_item.shape[0], y.shape[1]), y.dtype)
    rows = _ragged_all_to_all(
        y,
        room,
        starts(plan.counts[:, me]),
        plan.counts[:, me],
        starts(plan.counts, 1)[:, me],
        plan.counts[me],
        axis,
    )
    return combine(plan.order, rows)


def starts(sizes: Int[Array, "..."], axis: int = 0) -> Int[Array, "..."]:
    """The exclusive cumulative sum: where each of consecutive runs of these sizes starts."""
    return jnp.cumsum(sizes, axis) - sizes


def _ragged_all_to_all(operand, room, from_start, send_sizes, to_start, receive_sizes, axis):
    """`lax.ragged_all_to_all`; on CPUs, where XLA lacks it, the same result from an all-gather."""
    offsets = from_start, send_sizes, to_start
    if target().platform != "cpu":
        offsets = (*offsets, receive_sizes)
        return lax.ragged_all_to_all(operand, room, *offsets, axis_name=axis)
    me = lax.axis_index(axis)
    rows = lax.all_gather(operand, axis)
    from_start, sizes, to_start = (lax.all_gather(x, axis)[:, me, None] for x in offsets)
    index = jnp.arange(room.shape[0])
    mine = (index >= to_start) & (index < to_start + sizes)  # [P, room]
    source = jnp.argmax(mine, axis=0)
    row = jnp.take_along_axis(from_start + index - to_start, source[None], axis=0)[0]
    return jnp.where(jnp.any(mine, axis=0)[:, None], rows[source, row], room)
