"""The implementations of `grouped_matmul` and `gated_matmul`, as they run without hardware."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.choice import Implementation
from pallas_kernels.experts import combine, dispatch, gated_matmul, grouped_matmul
from pallas_kernels.experts.grouped import IMPLEMENTATIONS, GroupedCase
from pallas_kernels.experts.grouped_megablox import GroupedMegabloxConfig
from pallas_kernels.experts.grouped_mosaic import GroupedMosaicConfig
from pallas_kernels.experts.grouped_tpu import GroupedTpuConfig
from pallas_kernels.experts.grouped_xla import GroupedXlaConfig
from pallas_kernels.experts.mosaic_kernels import StreamConfig, TileConfig
from pallas_kernels.experts.mosaic_quantized import QuantizedConfig
from tests.pallas_kernels.experts.cases import GatedResults, Results, draw, planned
from tests.pallas_kernels.hopper import INTERPRET, no_races
from tests.pallas_kernels.tpu import INTERPRET as TPU_INTERPRET
from tests.pallas_kernels.tpu import no_races as no_tpu_races


@dataclasses.dataclass(frozen=True)
class Way:
    """An implementation with small sizes, which an interpreter runs quickly."""

    implementation: Implementation
    config: Any = None
    interpret: Any = None
    checked: Callable = contextlib.nullcontext
    variant: str = ""

    def why_not(self, case, dtype) -> str | None:
        """Says why the implementation does not serve a case; None if it does."""
        call = GroupedCase(case.block, case.E, case.D, case.F, dtype, interpret=self.interpret)
        return self.implementation.why_not(call)

    def call(self, function, plan, *arrays):
        """Runs one of the functions below."""
        options = {
            "implementation": self.implementation.name,
            "config": self.config,
            "interpret": self.interpret,
        }
        with self.checked():
            return jax.block_until_ready(function(tuple(options.items()), plan, *arrays))


NAMED = {each.name: each for each in IMPLEMENTATIONS}
XLA = Way(NAMED["xla"])
XLA_LOOP = Way(NAMED["xla"], GroupedXlaConfig(at_once=0), variant="-loop")
MOSAIC_GPU = Way(
    NAMED["mosaic_gpu"],
    GroupedMosaicConfig(
        TileConfig(slots=2, together=2), StreamConfig(slots=2), QuantizedConfig(slots=2, together=2)
    ),
    INTERPRET,
    no_races,
)
MOSAIC_TPU = Way(
    NAMED["mosaic_tpu"],
    GroupedTpuConfig(tile_bytes=2**16, columns=128, inputs=256, resident_bytes=2**15),
    TPU_INTERPRET,
    no_tpu_races,
)
MEGABLOX = Way(
    NAMED["megablox"],
    GroupedMegabloxConfig(row_bytes=512, columns=128, gradient=128),
    interpret=True,
)


def runs(way, dtype, cases):
    """The cases that an implementation serves, as parameters for `over`."""
    return [
        pytest.param(
            way, dtype, case, id=f"{way.implementation.name}{way.variant}-{dtype}-{case.name}"
        )
        for case in cases
        if way.why_not(case, dtype) is None
    ]


def over(*all_runs):
    return pytest.mark.parametrize(("way", "dtype", "case"), [*itertools.chain(*all_runs)])


@jax.custom_vjp
def spoil(plan, rows):
    """Sets rows of blocks without a group, which are undefined, to NaN; their cotangents too."""
    empty = plan.group_of_block == plan.group_sizes.shape[0]
    blocks = rows.reshape(len(empty), -1)
    return jnp.where(empty[:, None], jnp.nan, blocks).reshape(rows.shape).astype(rows.dtype)


spoil.defvjp(lambda plan, rows: (spoil(plan, rows), plan), lambda plan, dy: (None, spoil(plan, dy)))


def rows_of(plan, items):
    return spoil(plan, dispatch(plan, items))


def items_of(plan, rows):
    return combine(plan, spoil(plan, rows))


@functools.partial(jax.jit, static_argnums=0)
def multiplied(options, plan, x, w):
    """Each item multiplied by its group's matrix."""
    rows = rows_of(plan, x)
    return items_of(plan, grouped_matmul(rows, w, plan.group_of_block, **dict(options)))


@functools.partial(jax.jit, static_argnums=0)
def rows_multiplied(options, plan, rows, w):
    return grouped_matmul(rows, w, plan.group_of_block, **dict(options))


@functools.partial(jax.jit, static_argnums=0)
def gated(options, plan, x, scale, gate, up):
    """The gated product of each item, scaled if `scale` is not None."""
    rows, group = rows_of(plan, x), plan.group_of_block
    if scale is not None:
        scale = rows_of(plan, scale[:, None])[:, 0]
    return items_of(plan, gated_matmul(rows, gate, up, group, scale, **dict(options)))


@functools.partial(jax.jit, static_argnums=0)
def differentiated(options, plan, x, w, d_out):
    out, transpose = jax.vjp(functools.partial(multiplied, options, plan), x, w)
    return Results(out, *transpose(d_out))


@functools.partial(jax.jit, static_argnums=0)
def gated_differentiated(options, plan, x, scale, gate, up, d_out):
    out, transpose = jax.vjp(functools.partial(gated, options, plan), x, scale, gate, up)
    return GatedResults(out, *transpose(d_out))


@functools.cache
def results(way, dtype, case) -> Results:
    """All results of a case by one run of an implementation."""
    x, _, _, w, d_out = draw(case, dtype)
    return way.call(differentiated, planned(case), x, w, d_out)


@functools.cache
def gated_results(way, dtype, case) -> GatedResults:
    return way.call(gated_differentiated, planned(case), *draw(case, dtype))
