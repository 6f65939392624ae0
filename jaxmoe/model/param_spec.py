"""The declaration of a parameter: shape, sharding and initial values."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, the logical axis of each dimension, and what is done with it.

    Attributes:
        inputs: the dimensions that a matmul sums over; () for a table of vectors, None for the
            weights of a norm and for biases.
        quantizable: whether it may be stored as a `QuantizedMatrix`.
        start: the value that weights of a norm and biases begin with.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: tuple[int, ...] | None
    quantizable: bool = False
    start: float = 1.0

    @property
    def fan_in(self) -> int | None:
        """How many inputs are summed: entries start as normals of deviation `fan_in ** -0.5`."""
        return None if self.inputs is None else math.prod(self.shape[i] for i in self.inputs)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape as matrices [..., in, out]; dimensions that are summed are merged."""
        first, last = self._summed
        inputs, outputs = self.shape[first:last], self.shape[last:]
        return (*self.shape[:first], math.prod(inputs), math.prod(outputs))

    @property
    def matrix_axes(self) -> tuple[str | None, ...]:
        """The logical axes of `matrix_shape`."""
        first, last = self._summed
        return (*self.axes[:first], self.axes[first], self.axes[last])

    @property
    def _summed(self) -> tuple[int, int]:
        """The first dimension that is summed, and the one after the last."""
        if not self.inputs:
            raise ValueError(f"a parameter {self.shape} that sums nothing is no matrix.")
        return self.inputs[0], self.inputs[-1] + 1

    def init(self, key: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Initial values: normals of deviation `fan_in ** -0.5`, or all `start`."""
        if self.fan_in is None:
            return jnp.full(self.shape, self.start, dtype)
        return (jax.random.normal(key, self.shape) * self.fan_in**-0.5).astype(dtype)


# A tree of dicts and lists whose leaves are ParamSpecs; parameters have the same structure.
SpecTree = dict


def is_spec(x) -> bool:
    """Whether `x` is a ParamSpec, for `is_leaf` of tree functions."""
    return isinstance(x, ParamSpec)
