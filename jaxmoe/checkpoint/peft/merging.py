"""Adds an adapter to matrices block by block, as they go from one file to another."""

import functools
import math
from collections.abc import Callable

import numpy as np

from jaxmoe.checkpoint.mapping.tensors import Block
from jaxmoe.checkpoint.peft.layout import Factors
from jaxmoe.checkpoint.peft.reader import PeftAdapter
from jaxmoe.config import Llama4Config
from jaxmoe.model.params import named_specs


class Merging:
    """Adds one adapter to what is read of a checkpoint, and keeps account of the rounding."""

    def __init__(self, adapter: PeftAdapter, config: Llama4Config):
        """Reads no tensor yet; later one target's adapter at a time."""
        self._specs = named_specs(config)
        self._found = {one.target.params: one for one in adapter.found}
        self._factors: Callable[[tuple[str, ...]], Factors] = functools.lru_cache(maxsize=1)(
            lambda params: adapter.factors(self._found[params])
        )
        self._added, self._lost = 0.0, 0.0  # sums of squares

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence on the norm of what rounding changed, over the norm of what was added."""
        loss = math.sqrt(self._lost / self._added) if self._added else 0.0
        return (f"Rounding the sums changed them by {loss:.2%} of what the adapter adds.",)

    def merged(
        self, params: tuple[str, ...], block: Block, parts: list[np.ndarray], dtype: np.dtype
    ) -> list[np.ndarray]:
        """A block of parameters with the adapter added: float32 sums, rounded once to `dtype`.

        Args:
            params: the parameters that lie side by side in a tensor.
            parts: the block of each, in what they are stored in.
        """
        if params not in self._found:
            return [part.astype(dtype, copy=False) for part in parts]
        return [self._sum(params, i, block, part, dtype) for i, part in enumerate(parts)]

    def _sum(self, params, i: int, block: Block, part: np.ndarray, dtype: np.dtype) -> np.ndarray:
        delta = self._delta(params, i, block)
        exact = part.astype(np.float32) + delta
        rounded = exact.astype(dtype)
        error = rounded.astype(np.float32) - exact
        self._added += float(np.vdot(delta, delta))
        self._lost += float(np.vdot(error, error))
        return rounded

    def _delta(self, params: tuple[str, ...], i: int, block: Block) -> np.ndarray:
        """The block of scale * a @ b of the parameter `params[i]`, float32."""
        a, b = self._factors(params)
        b = np.split(b, len(params), axis=-1)[i]
        spec, rank = self._specs[params[i]], b.shape[-2]
        assert spec.inputs
        first, last = spec.inputs[0], spec.inputs[-1] + 1  # dimensions before are of experts
        outer, inputs, outputs = (
            block.index[s] for s in (slice(first), slice(first, last), slice(last, None))
        )
        a = a.reshape(*spec.shape[:last], rank)[(*outer, *inputs)]
        b = b.reshape(*spec.shape[:first], rank, *spec.shape[last:])[
            (*outer, slice(None), *outputs)
        ]
        delta = a.reshape(-1, rank).astype(np.float32) @ b.reshape(rank, -1).astype(np.float32)
        return self._found[params].scale * delta.reshape(block.shape)
