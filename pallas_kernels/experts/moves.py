"""`dispatch` and `combine`: items to their rows, and rows back to items.

Either is a gather by one of the plan's maps, and its gradient is the gather by the other: nothing
is ever scattered or added up.

Shape letters: N items, R rows, D width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.choice import Implementation, choose, resolve_config
from pallas_kernels.experts import moves_mosaic
from pallas_kernels.experts.plan import GroupPlan


@dataclasses.dataclass(frozen=True)
class MoveCase:
    """One call as known at trace time."""

    width: int
    dtype: str
    adds: bool = False
    interpret: Any = None
    config: Any = None  # the caller's; `run` gets one that is chosen


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """XLA has no sizes to choose."""


def take_xla(x, source, added, case: MoveCase):
    """`x[source]`, zero where `source` is out of range, plus `added` if that is not None."""
    rows = x.at[source].get(mode="fill", fill_value=0)
    return rows if added is None else rows + added


# Fastest first.
IMPLEMENTATIONS = (
    Implementation(
        "mosaic_gpu",
        moves_mosaic.why_not,
        moves_mosaic.take,
        moves_mosaic.Config,
        moves_mosaic.config_for,
    ),
    Implementation("xla", lambda case: None, take_xla, XlaConfig, lambda case: XlaConfig()),
)


@dataclasses.dataclass(frozen=True)
class _Static:
    implementation: Implementation
    case: MoveCase


def dispatch(
    plan: GroupPlan,
    x: Float[Array, "N D"],
    *,
    implementation: str | None = None,
    config: Any = None,
    interpret: Any = None,
) -> Float[Array, "R D"]:
    """Items to their rows; rows without an item are zero. Differentiable in reverse mode.

    Args:
        implementation: "mosaic_gpu" or "xla"; None for the fastest that serves the call, which
            `move_implementation` names.
        config: sizes, a `Config` of that implementation.
        interpret: `plgpu.InterpretGPUParams()` runs "mosaic_gpu" without its hardware.

    Raises:
        ValueError: if the arguments do not fit together, or the named implementation does not
            serve them; says which value and what is allowed.
    """
    _check_rows("x", x, plan.row_of_item.shape[0], "items")
    static = _static(x, None, implementation, config, interpret)
    return _move(static, x, plan.item_of_row, plan.row_of_item, None)


def combine(
    plan: GroupPlan,
    y: Float[Array, "R D"],
    shared: Float[Array, "N D"] | None = None,
    *,
    implementation: str | None = None,
    config: Any = None,
    interpret: Any = None,
) -> Float[Array, "N D"]:
    """Rows back to items, with the rest as in `dispatch`; items without a row are zero.

    Args:
        shared: is added to the items, in one pass over memory: what all of them get, such as from
            a shared expert. Sums are rounded once.
    """
    _check_rows("y", y, plan.item_of_row.shape[0], "rows")
    wanted = (plan.row_of_item.shape[0], y.shape[1])
    if shared is not None and (shared.shape != wanted or shared.dtype != y.dtype):
        raise ValueError(
            f"shared is {shared.dtype}{shared.shape}; it must be {y.dtype}{wanted}, as the items."
        )
    static = _static(y, shared, implementation, config, interpret)
    return _move(static, y, plan.row_of_item, plan.item_of_row, shared)


def move_implementation(x, shared=None, *, implementation=None, interpret=None) -> str:
    """The implementation that `dispatch` and `combine` pick for such arguments.

    Args:
        x, shared: arrays or ShapeDtypeStructs.
    """
    return _static(x, shared, implementation, None, interpret).implementation.name


def _check_rows(name: str, x, count: int, of: str) -> None:
    if x.ndim != 2 or x.shape[0] != count or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} is {x.dtype}{x.shape}; it must be floating, [{count}, width], for the plan's "
            f"{count} {of}."
        )


def _static(x, added, implementation, config, interpret) -> _Static:
    dtype = jnp.dtype(x.dtype).name
    case = MoveCase(x.shape[1], dtype, added is not None, interpret, config)
    return _Static(choose(IMPLEMENTATIONS, case, implementation), case)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _move(static: _Static, x, source, destination, added):
    """`x[source] + added`; `destination` is the map back, for the gradient."""
    config = resolve_config(static.implementation, static.case, static.case.config)
    case = dataclasses.replace(static.case, config=config)
    return static.implementation.run(x, source, added, case)


def _move_forward(static: _Static, x, source, destination, added):
    return _move(static, x, source, destination, added), (source, destination)


def _move_backward(static: _Static, maps, d_out):
    """The opposite move; what was added gets the gradient as it is."""
    source, destination = maps
    alone = dataclasses.replace(static, case=dataclasses.replace(static.case, adds=False))
    dx = _move(alone, d_out, destination, source, None)
    return dx, None, None, d_out if static.case.adds else None


_move.defvjp(_move_forward, _move_backward)
