"""What the backward pass keeps of a layer, and what it computes again."""

from collections.abc import Callable
from typing import Any, Literal

import jax

from pallas_kernels.attention import residuals

Remat = bool | Literal["none", "full", "attention", "dots"]
_POLICIES: dict[str, Any] = {
    "full": None,
    "attention": jax.checkpoint_policies.save_only_these_names(residuals.NAME),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def with_remat(layer: Callable, remat: Remat, static_argnums: tuple[int, ...]) -> Callable | None:
    """The layer with its backward pass as `remat` says; None where nothing is computed again.

    Args:
        layer: a function of arrays.
        remat: `full` or True keeps a layer's input only; `attention` also the attention's output
            and log-sum-exps, so that it runs once (on TPUs, whose kernel is JAX's own, it runs
            twice); `dots` keeps every product with a matrix that all rows share, which routed
            experts' are not; `none` or False keeps everything.
        static_argnums: which arguments are no arrays.
    """
    name = {True: "full", False: "none"}.get(remat, remat)  # pyrefly: ignore  # a key of any type
    if name == "none":
        return None
    return jax.checkpoint(layer, policy=_POLICIES[name], static_argnums=static_argnums)
