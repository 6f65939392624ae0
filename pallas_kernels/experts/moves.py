"""`dispatch` moves items to their rows, and `combine` moves rows back to items.

Each is a gather by one of the two maps of `GroupMetadata`, and its gradient is a gather by the
other, so that nothing is scattered or accumulated.

Shape letters: N items, R rows, D row width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.choice import Implementation, choose, resolve_config
from pallas_kernels.experts import moves_mosaic
from pallas_kernels.experts.group_metadata import GroupMetadata


@dataclasses.dataclass(frozen=True)
class MoveCase:
    """What is known of a call at trace time.

    Attributes:
        width: D.
        dtype: of the rows.
        adds: whether an array is added to the result.
        interpret: how to run a kernel without its hardware.
        config: the caller's config or None; an implementation is run with a config resolved.
    """

    width: int
    dtype: str
    adds: bool = False
    interpret: Any = None
    config: Any = None


@dataclasses.dataclass(frozen=True)
class MoveXlaConfig:
    """The config of the XLA implementation, which has no sizes to choose."""


def take_xla(x, source, added, case: MoveCase):
    """x[source], zero where `source` is out of range, plus `added` if it is not None."""
    rows = x.at[source].get(mode="fill", fill_value=0)
    return rows if added is None else rows + added


# Fastest first.
IMPLEMENTATIONS = (
    Implementation(
        "mosaic_gpu",
        moves_mosaic.why_not,
        moves_mosaic.take,
        moves_mosaic.MoveMosaicConfig,
        moves_mosaic.config_for,
    ),
    Implementation("xla", lambda case: None, take_xla, MoveXlaConfig, lambda case: MoveXlaConfig()),
)


@dataclasses.dataclass(frozen=True)
class _MoveCall:
    """The arguments of a call that are static under jit."""

    implementation: Implementation
    case: MoveCase


def dispatch(
    metadata: GroupMetadata,
    x: Float[Array, "N D"],
    *,
    implementation: str | None = None,
    config: Any = None,
    interpret: Any = None,
) -> Float[Array, "R D"]:
    """Moves items to their rows; rows without an item are zero. Differentiable in reverse mode.

    Args:
        metadata: from `make_group_metadata`.
        x: items.
        implementation: "mosaic_gpu" or "xla"; None for the fastest that serves the call, which
            `move_implementation` names.
        config: sizes, of that implementation's config type.
        interpret: `plgpu.InterpretGPUParams()` runs "mosaic_gpu" without its hardware.

    Raises:
        ValueError: if the arguments do not fit together, or the named implementation does not
            serve them; says which value and what is allowed.
    """
    _check_rows("x", x, metadata.row_of_item.shape[0], "items")
    call = _call(x, None, implementation, config, interpret)
    return _move(call, x, metadata.item_of_row, metadata.row_of_item, None)


def combine(
    metadata: GroupMetadata,
    y: Float[Array, "R D"],
    shared: Float[Array, "N D"] | None = None,
    *,
    implementation: str | None = None,
    config: Any = None,
    interpret: Any = None,
) -> Float[Array, "N D"]:
    """Moves rows back to their items; items without a row are zero.

    Differentiable in reverse mode. Arguments and errors not named here are as of `dispatch`.

    Args:
        metadata: from `make_group_metadata`.
        y: rows.
        shared: added to the items in the same pass over memory, such as a shared expert's output.
            Each sum is rounded once.
        implementation: as of `dispatch`.
        config: as of `dispatch`.
        interpret: as of `dispatch`.
    """
    _check_rows("y", y, metadata.item_of_row.shape[0], "rows")
    wanted = (metadata.row_of_item.shape[0], y.shape[1])
    if shared is not None and (shared.shape != wanted or shared.dtype != y.dtype):
        raise ValueError(
            f"shared is {shared.dtype}{shared.shape}; it must be {y.dtype}{wanted}, as the items."
        )
    call = _call(y, shared, implementation, config, interpret)
    return _move(call, y, metadata.row_of_item, metadata.item_of_row, shared)


def move_implementation(x, shared=None, *, implementation=None, interpret=None) -> str:
    """The name of the implementation that `dispatch` and `combine` pick for a call.

    Args:
        x, shared: arrays or ShapeDtypeStructs.
    """
    return _call(x, shared, implementation, None, interpret).implementation.name


def _check_rows(name: str, x, count: int, of: str) -> None:
    if x.ndim != 2 or x.shape[0] != count or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} is {x.dtype}{x.shape}; it must be floating, [{count}, width], for the plan's "
            f"{count} {of}."
        )


def _call(x, added, implementation, config, interpret) -> _MoveCall:
    dtype = jnp.dtype(x.dtype).name
    case = MoveCase(x.shape[1], dtype, added is not None, interpret, config)
    return _MoveCall(choose(IMPLEMENTATIONS, case, implementation), case)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _move(call: _MoveCall, x, source, destination, added):
    """x[source] + added; the gradient with respect to x is the gather by `destination`."""
    config = resolve_config(call.implementation, call.case, call.case.config)
    case = dataclasses.replace(call.case, config=config)
    return call.implementation.run(x, source, added, case)


def _move_forward(call: _MoveCall, x, source, destination, added):
    return _move(call, x, source, destination, added), (source, destination)


def _move_backward(call: _MoveCall, maps, d_out):
    """Moves the cotangent the opposite way; `added` gets the cotangent itself."""
    source, destination = maps
    alone = dataclasses.replace(call, case=dataclasses.replace(call.case, adds=False))
    dx = _move(alone, d_out, destination, source, None)
    return dx, None, None, d_out if call.case.adds else None


_move.defvjp(_move_forward, _move_backward)
