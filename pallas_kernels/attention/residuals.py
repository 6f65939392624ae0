"""The name under which what a flash attention keeps for its backward pass can be saved.

`jax.checkpoint` with the policy `save_only_these_names(NAME)` keeps outputs and log-sum-exps, so
that the backward pass does not run the attention again.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = "flash_attention"


def named(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output and the log-sum-exp of an attention, both named `NAME`."""
    return checkpoint_name(out, NAME), checkpoint_name(lse, NAME)
