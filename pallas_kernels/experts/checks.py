"""Checks at run time, switched on by an environment variable, of values that kernels trust."""

import os

import jax
import numpy as np
from jaxtyping import Array, Int

SWITCH = "JAXMOE_DEBUG_CHECKS"


def check_groups(group_of_block: Int[Array, "N"], groups: int) -> None:
    """If JAXMOE_DEBUG_CHECKS=1, adds a check that group_of_block ascends within 0 to `groups`.

    Other values would make a kernel read beyond the matrices; the running program then raises a
    ValueError. The variable is read when a program is traced, and without it nothing is added.
    """
    if os.environ.get(SWITCH, "0") not in ("", "0"):
        jax.debug.callback(_refuse_overrun, group_of_block, groups)


def _refuse_overrun(group_of_block, groups) -> None:
    group = np.asarray(group_of_block)
    wrong = np.flatnonzero((group < 0) | (group > groups))
    if wrong.size:
        raise ValueError(
            f"group_of_block[{wrong[0]}] is {group[wrong[0]]}; it must be 0 to {groups - 1}, or "
            f"{groups} for a block without rows."
        )
    falls = np.flatnonzero(np.diff(group) < 0)
    if falls.size:
        i = falls[0]
        raise ValueError(
            f"group_of_block falls from {group[i]} to {group[i + 1]} at {i + 1}; it must ascend."
        )
