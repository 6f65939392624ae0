"""Rows sent to the devices that hold their experts, and back. Nothing is dropped.

Only rows travel, each to its one device: a ragged all-to-all. Every device has room for all rows of
all devices, the most that can come.

Shape letters: N rows a device, P devices along the axis, D width; room is P * N.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.experts.moves import combine, dispatch
from pallas_kernels.experts.plan import GroupPlan, plan_groups
from pallas_kernels.platform import target


class ExchangePlan(NamedTuple):
    """Which rows go where; made of every device's counts."""

    order: GroupPlan  # this device's rows by destination
    counts: Int[Array, "P P"]  # rows from one device (first axis) to another


def plan_exchange(destination: Int[Array, "N"], axis: str | tuple[str, ...]) -> ExchangePlan:
    """To be called inside `jax.shard_map`.

    Args:
        destination: the index along `axis` of each row's device; P or more for a row that stays
            away.
    """
    order = plan_groups(destination, lax.axis_size(axis), 1)
    return ExchangePlan(order, lax.all_gather(order.group_sizes, axis))


def send(
    plan: ExchangePlan, x: Float[Array, "N D"], axis: str | tuple[str, ...]
) -> Float[Array, "room D"]:
    """The rows that came to this device, by the device they are from; zeros after them."""
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
    """The opposite of `send`; zeros for rows that stayed away."""
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
    """Where each run starts when runs of these sizes lie one after the other."""
    return jnp.cumsum(sizes, axis) - sizes


def _ragged_all_to_all(operand, room, from_start, send_sizes, to_start, receive_sizes, axis):
    """`lax.ragged_all_to_all`, or its exact equal where XLA has none: on CPUs."""
    offsets = from_start, send_sizes, to_start
    if target().platform != "cpu":
        offsets = (*offsets, receive_sizes)
        return lax.ragged_all_to_all(operand, room, *offsets, axis_name=axis)
    me = lax.axis_index(axis)
    rows = lax.all_gather(operand, axis)
    from_start, sizes, to_start = (lax.all_gather(x, axis)[:, me, None] for x in offsets)
    place = jnp.arange(room.shape[0])
    mine = (place >= to_start) & (place < to_start + sizes)
    source = jnp.argmax(mine, axis=0)
    row = jnp.take_along_axis(from_start + place - to_start, source[None], axis=0)[0]
    return jnp.where(jnp.any(mine, axis=0)[:, None], rows[source, row], room)
