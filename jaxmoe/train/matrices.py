"""Which axes of a parameter are a matrix's rows and columns, for optimizers that treat matrices."""

from typing import Any, NamedTuple

import jax

from jaxmoe.train.partition import dotted

_OUTER = ("embed", "lm_head", "router", "class_embedding", "position_embedding")


class MatrixAxes(NamedTuple):
    """The axes of a parameter that are a matrix's inputs and its outputs; others count matrices."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def matrix_axes(name: str, ndim: int) -> MatrixAxes | None:
    """The axes of the matrices in a parameter; None for a vector.

    Heads and their dimensions are one axis of a matrix: `q`, `k` and `v` have the shape
    [embed, heads, dim] and `o` has [heads, dim, embed]. Any other parameter is matrices in its last
    two axes, such as one for each expert.

    Args:
        name: dotted, such as `layers.3.attention.q`.
        ndim: how many axes the parameter has.
    """
    if ndim < 2:
        return None
    last = name.rpartition(".")[2]
    if ndim == 3 and last in ("q", "k", "v"):
        return MatrixAxes((0,), (1, 2))
    if ndim == 3 and last == "o":
        return MatrixAxes((0, 1), (2,))
    return MatrixAxes((ndim - 2,), (ndim - 1,))


def axes_of(params: Any) -> Any:
    """The `matrix_axes` of each parameter, in a tree like `params`."""
    return jax.tree.map_with_path(lambda path, p: matrix_axes(dotted(path), p.ndim), params)


def is_hidden(name: str, ndim: int) -> bool:
    """Whether a parameter is matrices between hidden states: no embedding, head, router, vector."""
    return ndim >= 2 and name.rpartition(".")[2] not in _OUTER
