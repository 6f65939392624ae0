"""The implementations of `flash_attention`, each as it runs without its hardware."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import pytest

from pallas_kernels.attention import (
    flash_attention,
    flash_cudnn,
    flash_mosaic,
    flash_splash,
    flash_xla,
)
from pallas_kernels.attention.checks import take_mask
from pallas_kernels.attention.flash import FlashCase
from pallas_kernels.attention.mosaic_backward import BackwardConfig
from pallas_kernels.attention.mosaic_forward import ForwardConfig
from pallas_kernels.choice import Implementation
from tests.pallas_kernels.attention.cases import CASES, SCALE, Case, Results, draw
from tests.pallas_kernels.hopper import INTERPRET, no_races


@dataclasses.dataclass(frozen=True)
class Way:
    """An implementation, with blocks that are small enough for several of them to be met."""

    implementation: Implementation
    config: Callable[[Case], Any]
    interpret: Any = None
    checked: Callable = contextlib.nullcontext
    kind: str = ""  # of those with one implementation
    return_lse: bool = True  # where a call does not say

    def __str__(self):
        return self.implementation.name + self.kind

    def why_not(self, case, dtype) -> str | None:
        """Why it does not serve a case, or None."""
        (rows, queries), (_, keys) = case.q.position.shape, case.k.position.shape
        sizes = (rows, *case.heads, queries, keys, case.head_dim)
        options = {"plain": case.plain, **self._options(case)}
        options["mask"] = take_mask(options)
        return self.implementation.why_not(FlashCase(*sizes, dtype, **options))

    def _options(self, case) -> dict:
        return {
            "scale": SCALE, "causal": case.causal, "chunk": case.chunk, "in_order": case.in_order,
            "return_lse": self.return_lse, "interpret": self.interpret,
        }  # fmt: skip

    def call(self, function, case, *arrays, **changes):
        """Runs one of the functions below, with changed options."""
        own = {"implementation": self.implementation.name, "config": self.config(case)}
        options = own | self._options(case) | changes
        coords = (None, None) if case.plain else (case.q, case.k)
        with self.checked():
            return jax.block_until_ready(function(tuple(options.items()), coords, *arrays))


XLA = Way(flash_xla.IMPLEMENTATION, lambda case: flash_xla.FlashXlaConfig(*case.blocks))
# As on GPUs, whose host does not wait for data.
XLA_OF_FIXED_LENGTH = Way(
    flash_xla.IMPLEMENTATION,
    lambda case: flash_xla.FlashXlaConfig(*case.blocks, data_decides=False),
    kind="-fixed",
)
# The function of JAX's that calls cuDNN, on XLA.
CUDNN = Way(flash_cudnn.IMPLEMENTATION, lambda case: None, True, return_lse=False)
MOSAIC_GPU = Way(
    flash_mosaic.IMPLEMENTATION,
    lambda case: flash_mosaic.FlashMosaicConfig(
        ForwardConfig(block_k=64), BackwardConfig(block_k=64)
    ),
    INTERPRET,
    no_races,
)
SPLASH = Way(
    flash_splash.IMPLEMENTATION, lambda case: flash_splash.FlashSplashConfig(128, 128), True
)


def runs(way, dtype, cases=CASES, served=True):
    """Those of the cases that an implementation serves, or does not, for `over`."""
    return [
        pytest.param(way, dtype, case, id=f"{way}-{dtype}-{case.name}")
        for case in cases
        if served == (way.why_not(case, dtype) is None)
    ]


def over(*all_runs):
    return pytest.mark.parametrize(("way", "dtype", "case"), [*itertools.chain(*all_runs)])


@functools.partial(jax.jit, static_argnums=0)
def forward(options, coords, q, k, v):
    """The output, and the log-sum-exp if wanted."""
    return flash_attention(q, k, v, *coords, **dict(options))


@functools.partial(jax.jit, static_argnums=0)
def differentiated(options, coords, q, k, v, d_out, d_lse):
    """Results, differentiated by way of the output and of the log-sum-exp."""
    attend = functools.partial(forward, options, coords)
    (out, lse), transpose = jax.vjp(attend, q, k, v)
    return Results(out, lse, *transpose((d_out.astype(out.dtype), d_lse)))


@functools.partial(jax.jit, static_argnums=0)
def differentiated_alone(options, coords, q, k, v, d_out):
    """The output and its gradients, of a call without the log-sum-exp."""
    attend = functools.partial(forward, (*options, ("return_lse", False)), coords)
    out, transpose = jax.vjp(attend, q, k, v)
    return out, *transpose(d_out)


@functools.cache
def results(way, dtype, case) -> Results:
    """All of a case's, by one run."""
    return way.call(differentiated, case, *draw(case, dtype))
