"""Which blocks of queries attend to which blocks of keys, as a list for one loop over pairs."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attention.masks import (
    Coords,
    KeyRange,
    Mask,
    block_ranges,
    extents,
    visible_blocks,
)


class Pairs(NamedTuple):
    """Indices of blocks of queries and of keys; only the first `count` pairs are used."""

    q: jax.Array
    k: jax.Array
    count: int | jax.Array


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is known of a call's pairs of blocks before it runs.

    Attributes:
        ahead: by how many slots queries lie behind the keys of the same positions, in one sequence
            or several, all in order; None if the order of tokens is not known.
        aligned: slots of keys are positions.
        data_decides: as in `flash_xla.FlashXlaConfig`.
    """

    block_q: int
    block_k: int
    mask: Mask
    ahead: int | None
    aligned: bool
    data_decides: bool

    @classmethod
    def of(cls, case, block_q: int, block_k: int, data_decides: bool) -> "Rule":
        """Reads a `FlashCase`."""
        ahead = case.keys - case.queries if case.in_order or case.plain else None
        return cls(block_q, block_k, case.mask, ahead, case.plain, data_decides)


def over_pairs(rule: Rule, q: KeyRange, k: Coords, loop: Callable[[Pairs], Any]) -> Any:
    """The result of `loop` over a list of pairs, with every pair in which some query sees some key.

    The list's length is known while tracing, unless data decides; then it has no other pairs.
    """
    sizes = q.segment.shape[1] // rule.block_q, k.segment.shape[1] // rule.block_k
    listed = _possible(rule, *sizes)
    if rule.data_decides:
        return loop(chosen(listed, visible_pairs(rule, q, k)[listed.q, listed.k]))
    band = _widest(rule)
    if rule.ahead is not None or band is None or band >= sizes[1]:
        return loop(listed)
    # Nothing is promised, and tokens may be in order all the same, as on one of several devices.
    visible = visible_pairs(rule, q, k)
    start, *_, stop = (x[0] for x in block_ranges(visible[None], visible[None]))
    in_band = jnp.all(stop - start <= band)
    start = jnp.minimum(start, sizes[1] - band)
    narrow = _listed(np.repeat(np.arange(sizes[0]), band), start[:, None] + np.arange(band))
    return lax.cond(in_band, lambda: loop(narrow), lambda: loop(listed))


def chosen(pairs: Pairs, visible: jax.Array) -> Pairs:
    """The pairs for which `visible` is true, in the same order."""
    order = jnp.argsort(~visible, stable=True)
    return Pairs(pairs.q[order], pairs.k[order], jnp.sum(visible))


def every_block(count: int) -> Pairs:
    """The pairs of one block of queries with each of `count` blocks of keys."""
    return _listed(np.zeros(count), np.arange(count))


def _listed(q, k) -> Pairs:
    return Pairs(jnp.asarray(q, jnp.int32), jnp.asarray(k, jnp.int32).reshape(-1), len(q))


def visible_pairs(rule: Rule, q: KeyRange, k: Coords) -> jax.Array:
    """[query blocks, key blocks]: whether some query of some row may see some key."""
    some, _ = visible_blocks(q, extents(k, rule.block_k), rule.block_q)
    return jnp.any(some, axis=0)


def _possible(rule: Rule, q_blocks: int, k_blocks: int) -> Pairs:
    """The pairs that the rule allows for tokens in order, or all pairs, by block of queries."""
    i, j = (x.reshape(-1) for x in np.indices((q_blocks, k_blocks)))
    if rule.ahead is None or not rule.mask.causal:
        return _listed(i, j)
    first, last = i * rule.block_q + rule.ahead, (i + 1) * rule.block_q + rule.ahead - 1
    allowed = j * rule.block_k <= last
    if rule.mask.span is not None:
        oldest = rule.mask.first(first) if rule.aligned else first - rule.mask.span + 1
        allowed &= (j + 1) * rule.block_k > oldest
    return _listed(i[allowed], j[allowed])


def _widest(rule: Rule) -> int | None:
    """How many blocks of keys a block of queries attends to at most if all are in order."""
    if rule.mask.span is None:
        return None
    return (rule.mask.span + rule.block_q - 3) // rule.block_k + 2
