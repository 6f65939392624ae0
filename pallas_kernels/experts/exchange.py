"""Sends rows to the devices that hold their experts and back, by a ragged all-to-all.

Each row goes to one device and nothing is dropped: the receive buffer of every device holds all
rows of all devices, the most that can arrive.

Shape letters: N rows on each device, P devices along the axis, D row width; room is P * N.
"""

import functools
from typing import NamedTuple

import jax
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
    return _moved(False, axis, plan.counts, dispatch(plan.order, x))


def send_back(
    plan: ExchangePlan, y: Float[Array, "room D"], axis: str | tuple[str, ...]
) -> Float[Array, "N D"]:
    """Returns received rows to the devices they came from, in their old order.

    The result is zero for rows that were not sent.
    """
    return combine(plan.order, _moved(True, axis, plan.counts, y))


# The gradient of rows that were sent is sent back, and the reverse. JAX's own rule makes the zeros
# that the exchange fills of constants, which `_zeros` is not.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _moved(back: bool, axis, counts: Int[Array, "P P"], rows: Float[Array, "R D"]) -> jax.Array:
    """Rows of all devices where `counts` says that they go, or `back` from there; then zeros."""
    me, devices = lax.axis_index(axis), len(counts)
    sizes = counts.T if back else counts
    length = len(rows) // devices if back else len(rows) * devices
    return _ragged_all_to_all(
        rows,
        _zeros((length, rows.shape[1]), rows.dtype, counts),
        starts(sizes[me]),
        sizes[me],
        starts(sizes, 0)[me],
        sizes[:, me],
        axis,
    )


def _moved_forward(back, axis, counts, rows):
    return _moved(back, axis, counts, rows), counts


def _moved_backward(back, axis, counts, d_moved):
    return None, _moved(not back, axis, counts, d_moved)


_moved.defvjp(_moved_forward, _moved_backward)


def _zeros(shape: tuple[int, ...], dtype, counts: Int[Array, "P P"]) -> jax.Array:
    """Zeros that the compiler takes to depend on the counts.

    Constants it makes early: those of all layers at once, before the first, so that they are in
    memory together.
    """
    return jnp.full(shape, (counts[0, 0] < 0).astype(dtype))


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
