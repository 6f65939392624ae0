"""Adapters of a model (`jaxmoe.model.lora`): which matrices take one, making, adding and merging.

The experts' `gate` and `up` are one matrix in PEFT's files, so their adapters share `a`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.mesh import check_divides, param_spec, sharding
from jaxmoe.model.lora import LoraMatrix, LoraSet, is_lora, merged_matrix
from jaxmoe.model.param_spec import ParamSpec
from jaxmoe.model.params import named_params, named_specs, unflatten_params
from pallas_kernels.quantized import QuantizedMatrix


class Adapter(NamedTuple):
    """An adapter as a `LoraMatrix` holds it, in arrays or ShapeDtypeStructs.

    Attributes:
        a: [..., in, r]; None where it is the `a` of the experts' `gate`.
        b: [..., r, out].
        scale: what multiplies a @ b.
    """

    a: Any
    b: Any
    scale: float

    def beside(self, w: Any) -> LoraMatrix:
        """The parameter `w` with the adapter."""
        return LoraMatrix(w, *self)


class Adapters(NamedTuple):
    """Several adapters as a `LoraSet` holds them; see there."""

    a: Any
    b: Any
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    def beside(self, w: Any) -> LoraSet:
        """The parameter `w` with the adapters."""
        return LoraSet(w, *self)


def adaptable(config: Llama4Config) -> dict[str, ParamSpec]:
    """The specs of the parameters that can have an adapter, by dotted name.

    They are all matrices of the decoder's layers and of the vision tower, its adapter and projector
    included.
    """
    specs = named_specs(config).items()
    return {name: spec for name, spec in specs if spec.inputs and name != "lm_head"}


def abstract_adapters(
    config: Llama4Config,
    mesh: jax.sharding.Mesh,
    ranks: Mapping[str, int],
    dtype: Any = jnp.float32,
) -> dict[str, tuple[Any, Any]]:
    """The shapes and shardings of `a` and `b` of some parameters' adapters, by dotted name.

    Inputs and outputs lie as those of the parameter, and the rank is on every device.

    Args:
        ranks: by dotted name.

    Raises:
        UserError: if the mesh does not divide a parameter.
    """
    specs = named_specs(config)

    def placed(name: str, shape: tuple, axes: tuple) -> jax.ShapeDtypeStruct:
        check_divides(f"the adapter of {name}", shape, axes, mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, param_spec(axes)))

    def pair(name: str, rank: int) -> tuple[Any, Any]:
        *outer, inputs, outputs = specs[name].matrix_shape
        *axes, of_inputs, of_outputs = specs[name].matrix_axes
        a = placed(name, (*outer, inputs, rank), (*axes, of_inputs, None))
        b = placed(name, (*outer, rank, outputs), (*axes, None, of_outputs))
        return None if shares_with(name) else a, b

    return {name: pair(name, rank) for name, rank in ranks.items()}


def init_adapters(abstract: Mapping[str, tuple[Any, Any]], key: jax.Array) -> dict:
    """The first `a` and `b` by name: `a` uniform in +-1 / sqrt(in), and `b` zero.

    So a model with new adapters computes what it did without them.
    """
    keys = dict(zip(abstract, jax.random.split(key, len(abstract)), strict=True))

    def drawn(name: str, a: Any, b: Any) -> tuple[Any, Any]:
        if a is not None:
            bound = a.shape[-2] ** -0.5
            a = jax.random.uniform(keys[name], a.shape, a.dtype, -bound, bound)
        return a, jnp.zeros(b.shape, b.dtype)

    def init() -> dict:
        return {name: drawn(name, *pair) for name, pair in abstract.items()}

    places = jax.tree.map(lambda x: x.sharding, dict(abstract))
    return jax.jit(init, out_shardings=places)()


def with_adapters(
    config: Llama4Config, params: dict, adapters: Mapping[str, Adapter | Adapters]
) -> dict:
    """The parameters with adapters beside some of them, by dotted name."""
    named = named_params(config, params).items()
    added = [adapters[name].beside(w) if name in adapters else w for name, (_, w) in named]
    return unflatten_params(config, added)


def adapter_names(params: dict) -> tuple[str, ...]:
    """The names of the adapters that a request can choose; none if the model has no `LoraSet`."""
    found = (w for w in jax.tree.leaves(params, is_leaf=is_lora) if isinstance(w, LoraSet))
    return next((w.names for w in found), ())


def one_adapter(params: dict, name: str | None) -> dict:
    """The parameters with the adapter of that name alone, or with none of several.

    Raises:
        UserError: if there are named adapters, and none of that name.
    """
    names = adapter_names(params)
    if name is None and not names:
        return params
    number = adapter_number(names, name)

    def of_one(w: Any) -> Any:
        if not isinstance(w, LoraSet):
            return w
        if not number or not w.ranks[number - 1]:
            return w.base
        start, rank = sum(w.ranks[: number - 1]), w.ranks[number - 1]
        own = slice(start, start + rank)
        a = None if w.a is None else w.a[..., own]
        return LoraMatrix(w.base, a, w.b[..., own, :], w.scales[number - 1])

    return jax.tree.map(of_one, params, is_leaf=is_lora)


def adapter_number(names: Sequence[str], name: str | None) -> int:
    """The number of a named adapter in the index of a `LoraSet`, from 1 on; 0 for None.

    Raises:
        UserError: if there is none of that name.
    """
    if name is None:
        return 0
    if name not in names:
        known = f"there are {', '.join(names):.200}" if names else "the model has none by name"
        raise UserError(f"there is no adapter {name!r:.80}; {known}.")
    return 1 + list(names).index(name)


def merge_adapters(config: Llama4Config, params: dict, *, requantize: bool = False) -> dict:
    """The parameters with each adapter added to its matrix: the model that serves fastest.

    Sums are float32, rounded once to the dtype of the matrix.

    Args:
        requantize: whether sums with quantized matrices are quantized again, which rounds them to
            8 or 4 bits.

    Raises:
        UserError: if a matrix is quantized and is not to be so again, or there are several
            adapters: `one_adapter` leaves one.
    """
    if names := adapter_names(params):
        raise UserError(f"the model has the adapters {', '.join(names):.200}; merge one of them.")
    named = {name: w for name, (_, w) in named_params(config, params).items()}

    def merged(name: str, w: Any) -> Any:
        if not isinstance(w, LoraMatrix):
            return w
        if isinstance(w.base, QuantizedMatrix) and not requantize:
            raise UserError(
                f"{name} is in {w.base.format}, and adding its adapter would round it again; ask "
                "for requantize, or keep the adapter beside it."
            )
        a = named[str(shares_with(name))].a if w.a is None else w.a
        placed = jax.tree.map(lambda x: x.sharding, w.base)
        return jax.jit(merged_matrix, out_shardings=placed)(w, a)

    return unflatten_params(config, [merged(name, w) for name, w in named.items()])


def shares_with(name: str) -> str | None:
    """The name of the parameter whose `a` is this one's too: of experts' `up`, their `gate`."""
    return name.removesuffix("up") + "gate" if name.endswith(".experts.up") else None
