"""Which parameters are trained: a tree in two, each with None where the other has an array."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax

from jaxmoe.errors import UserError
from pallas_kernels.quantized import QuantizedMatrix

Trainable = Callable[[str], bool]


def everything(name: str) -> bool:
    """The predicate that trains all parameters."""
    return True


def text_only(name: str) -> bool:
    """The predicate that trains all parameters but those of a vision tower."""
    return not name.startswith("vision.")


def all_but(frozen: Sequence[str], trainable: Trainable, params: dict) -> Trainable:
    """The predicate that trains what `trainable` says, without the names that a pattern matches.

    Args:
        frozen: patterns, in which `*` stands for anything, dots too.
        trainable: another predicate.
        params: a tree of arrays, or of their shapes, with a name for every pattern.

    Raises:
        UserError: if a pattern matches no name, or nothing is left to train.
    """
    leaves = jax.tree.leaves_with_path(params, is_leaf=is_quantized)
    names = [dotted(path) for path, _ in leaves]
    for pattern in frozen:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"'frozen' has {pattern!r:.80}, which is no parameter's name; there are names such "
                f"as {names[0]} and {names[-1]}."
            )

    def trained(name: str) -> bool:
        return trainable(name) and not any(fnmatchcase(name, pattern) for pattern in frozen)

    if not any(map(trained, names)):
        raise UserError("'frozen' leaves no parameter to train; leave out a pattern.")
    return trained


def is_quantized(w: Any) -> bool:
    """Whether a parameter is a QuantizedMatrix, whose arrays are no parameters of their own."""
    return isinstance(w, QuantizedMatrix)


def split(params: dict, trainable: Trainable) -> tuple[dict, dict]:
    """The parameters that are trained and the others, by their dotted names.

    Args:
        params: a tree of arrays, or of their shapes.
        trainable: whether the parameter of a name, such as `layers.3.attention.q`, is trained.
    """

    def part(wanted: bool) -> dict:
        def kept(path: tuple, x: Any) -> Any:
            return x if trainable(dotted(path)) == wanted else None

        return jax.tree.map_with_path(kept, params, is_leaf=is_quantized)

    return part(True), part(False)


def join(trained: dict, frozen: dict) -> dict:
    """The whole tree of the two that `split` returns."""

    def either(one: Any, other: Any) -> Any:
        return other if one is None else one

    return jax.tree.map(either, trained, frozen, is_leaf=lambda x: x is None)


def dotted(path: tuple) -> str:
    """The name of a leaf of a tree of dicts, lists and dataclasses, as `layers.3.attention.q`."""
    parts = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path)
    return ".".join(map(str, parts))
