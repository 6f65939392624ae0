"""How PEFT names the matrices of a model, and how its two matrices A and B hold an adapter's a, b.

A Linear's A is [r, in] and its B [out, r]. Experts that are one tensor [E, in, out] are adapted as
one: A has E * r rows, expert by expert, and B has r * E columns, rank by rank. Up to PEFT 0.18 A's
width is the experts' inputs and B's their outputs; from 0.19 on it is the other way round.

Shape letters: E experts, r rank.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxmoe.checkpoint.mapping import names
from jaxmoe.checkpoint.mapping.tensors import array_shapes, expand
from jaxmoe.config import Llama4Config
from jaxmoe.model.adapters import adaptable

PREFIX = "base_model.model."
INNER = ".base_layer"  # the experts' gate and up, where their down has an adapter, too
OLDER, NEWER = "peft-0.18", "peft-0.19"
ExpertLayout = Literal["peft-0.18", "peft-0.19"]


class Target(NamedTuple):
    """A matrix of the Hugging Face model that can have an adapter.

    Attributes:
        key: its name there, without `.weight`.
        params: the parameters that it holds, by dotted name: one, or the experts' gate and up.
        experts: how many matrices it holds; None for a Linear.
        inputs: the width of its inputs.
        outputs: the width of its outputs.
    """

    key: str
    params: tuple[str, ...]
    experts: int | None
    inputs: int
    outputs: int

    @property
    def module(self) -> str:
        """The name of the module that PEFT wraps."""
        return self.key if self.experts is None else self.key.rpartition(".")[0]

    @property
    def parameter(self) -> str | None:
        """Its name among PEFT's `target_parameters`; None where PEFT wraps a Linear instead.

        A router is a Linear whose output is none, so its weight is named.
        """
        if self.key.endswith(".router"):
            return f"{self.key}.weight"
        return None if self.experts is None else self.key


def targets(config: Llama4Config) -> list[Target]:
    """Every matrix that can have an adapter, in model order."""
    specs = adaptable(config)
    rows = names.TEXT + names.FUSED + names.LAST + names.VISION
    return [
        _target(config, group.params, tensor)
        for group in expand(rows, array_shapes(config, {}))
        for tensor in group.tensors
        if group.params[0] in specs
    ]


def _target(config: Llama4Config, params: tuple[str, ...], tensor: str) -> Target:
    *experts, inputs, outputs = adaptable(config)[params[0]].matrix_shape
    nested = config.vision is not None and not names.is_vision(tensor)
    key = (names.TEXT_PREFIX if nested else "") + tensor.removesuffix(".weight")
    return Target(key, params, experts[0] if experts else None, inputs, outputs * len(params))


def tensor_names(module: str) -> tuple[str, str]:
    """The names of A and B of a module in the file."""
    return tuple(f"{PREFIX}{module}.lora_{x}.weight" for x in "AB")  # pyrefly: ignore  # two


def layouts_of(target: Target, a_width: int, b_width: int) -> Iterator[ExpertLayout]:
    """The layouts in which a target's A and B have these widths; both if it is square.

    Args:
        a_width: of A, its second dimension.
        b_width: of B, its first dimension.
    """
    if (a_width, b_width) == (target.inputs, target.outputs):
        yield OLDER
    if (a_width, b_width) == (target.outputs, target.inputs):
        yield NEWER


Factors = tuple[Float[np.ndarray, "*E inputs r"], Float[np.ndarray, "*E r outputs"]]


def to_factors(
    target: Target,
    A: Float[np.ndarray, "rows a_width"],
    B: Float[np.ndarray, "b_width rows"],
    layout: ExpertLayout,
) -> Factors:
    """An adapter's a and b of PEFT's A and B; views of them."""
    if target.experts is None:
        return A.T, B.T
    by_rows = A.reshape(target.experts, -1, A.shape[1])
    by_columns = B.reshape(B.shape[0], -1, target.experts).transpose(2, 1, 0)
    inner, outer = (by_rows, by_columns) if layout == OLDER else (by_columns, by_rows)
    return inner.transpose(0, 2, 1), outer


def from_factors(
    target: Target,
    a: Float[np.ndarray, "*E inputs r"],
    b: Float[np.ndarray, "*E r outputs"],
    layout: ExpertLayout,
) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's A and B of an adapter: the inverse of `to_factors`."""
    if target.experts is None:
        return a.T, b.T
    inner, outer = a.transpose(0, 2, 1), b
    by_rows, by_columns = (inner, outer) if layout == OLDER else (outer, inner)
    width = by_columns.shape[2]
    return by_rows.reshape(-1, by_rows.shape[2]), by_columns.transpose(2, 1, 0).reshape(width, -1)
