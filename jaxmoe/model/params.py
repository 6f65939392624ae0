"""Every parameter, declared once: shape, logical axes, initializer.

Initialization, sharding, conversion, loading and planning all read `param_specs`.

Dimension names: V vocabulary, D embed, H query heads, K key/value heads, d head dim, E experts,
F feed-forward width.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.config import LayerKind, Llama4Config
from jaxmoe.mesh import PADDED, check_divides, padded_shape, param_spec, sharding
from jaxmoe.model.lora import Lora, lora_axes
from jaxmoe.model.param_spec import ParamSpec, SpecTree, is_spec
from jaxmoe.model.quantized import matrix_axes
from jaxmoe.model.vision_params import vision_specs
from pallas_kernels.quantized import QuantizedMatrix, quantize_matrix


def attention_specs(config: Llama4Config) -> SpecTree:
    """Projections of one attention block."""
    D, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    d = config.head_dim
    return {
        "q": ParamSpec((D, H, d), ("embed", "heads", None), (0,), quantizable=True),
        "k": ParamSpec((D, K, d), ("embed", "kv_heads", None), (0,), quantizable=True),
        "v": ParamSpec((D, K, d), ("embed", "kv_heads", None), (0,), quantizable=True),
        "o": ParamSpec((H, d, D), ("heads", None, "embed"), (0, 1), quantizable=True),
    }


def swiglu_specs(D: int, F: int) -> SpecTree:
    """The matrices of a dense feed-forward layer, or of the shared expert: D inputs, width F."""
    return {
        "gate": ParamSpec((D, F), ("embed", "ffn"), (0,), quantizable=True),
        "up": ParamSpec((D, F), ("embed", "ffn"), (0,), quantizable=True),
        "down": ParamSpec((F, D), ("ffn", "embed"), (0,), quantizable=True),
    }


def moe_specs(config: Llama4Config) -> SpecTree:
    """Router, shared expert and routed experts of one layer."""
    D, F, E = config.hidden_size, config.intermediate_size, config.num_local_experts
    bias = ParamSpec((E,), (None,), None, start=0.0)
    return {
        **({"selection_bias": bias} if config.selection_bias else {}),
        "router": ParamSpec((D, E), ("embed", None), (0,)),
        "shared": swiglu_specs(D, F),
        "experts": {
            "gate": ParamSpec((E, D, F), ("expert", "embed", "ffn"), (1,), quantizable=True),
            "up": ParamSpec((E, D, F), ("expert", "embed", "ffn"), (1,), quantizable=True),
            "down": ParamSpec((E, F, D), ("expert", "ffn", "embed"), (1,), quantizable=True),
        },
    }


def layer_specs(config: Llama4Config, kind: LayerKind) -> SpecTree:
    """The parameters of one decoder layer."""
    D = config.hidden_size
    is_moe = kind.feed_forward == "moe"
    return {
        "attention_norm": ParamSpec((D,), (None,), None),
        "attention": attention_specs(config),
        "feed_forward_norm": ParamSpec((D,), (None,), None),
        "feed_forward": moe_specs(config)
        if is_moe
        else swiglu_specs(D, config.intermediate_size_mlp),
    }


def param_specs(config: Llama4Config) -> SpecTree:
    """The parameters of the model; `layers` is a list, first layer first."""
    D, V = config.hidden_size, config.vocab_size
    specs: SpecTree = {
        "embed": ParamSpec((V, D), ("vocab", "embed"), ()),
        "layers": [layer_specs(config, kind) for kind in config.layers],
        "norm": ParamSpec((D,), (None,), None),
    }
    if not config.tie_word_embeddings:
        specs["lm_head"] = ParamSpec((D, V), ("embed", "vocab"), (0,))
    if config.vision is not None:
        specs["vision"] = vision_specs(config.vision, D)
    return specs


def map_specs(function: Callable, specs: SpecTree | ParamSpec, *rest):
    """`jax.tree.map` over specs (and parameter trees of the same structure)."""
    return jax.tree.map(function, specs, *rest, is_leaf=is_spec)


def named_specs(config: Llama4Config) -> dict[str, ParamSpec]:
    """Each parameter's spec by dotted name, such as `layers.3.attention.q`, in a fixed order."""
    leaves, _ = jax.tree.flatten_with_path(param_specs(config), is_leaf=is_spec)
    return {
        ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): spec
        for path, spec in leaves
    }


def named_params(config: Llama4Config, params: SpecTree) -> dict[str, tuple[ParamSpec, Any]]:
    """Each parameter by dotted name: its spec, and its array or `QuantizedMatrix`."""
    treedef = jax.tree.structure(param_specs(config), is_leaf=is_spec)
    specs = named_specs(config)
    stored = zip(specs.items(), treedef.flatten_up_to(params), strict=True)
    return {name: (spec, w) for (name, spec), w in stored}


def unflatten_params(config: Llama4Config, stored: list) -> SpecTree:
    """The parameter tree of leaves in the order of `named_specs`."""
    return jax.tree.unflatten(jax.tree.structure(param_specs(config), is_leaf=is_spec), stored)


def num_params(config: Llama4Config) -> int:
    """How many numbers the parameters are."""
    return sum(math.prod(spec.shape) for spec in named_specs(config).values())


def init_params(config: Llama4Config, key: jax.Array, dtype=jnp.float32):
    """Random parameters: a tree of arrays like `param_specs`."""
    specs = param_specs(config)
    leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten([spec.init(k, dtype) for spec, k in zip(leaves, keys, strict=True)])


def stored_axes(spec: ParamSpec, w):
    """The logical axes of each array that stores a parameter, in a tree like `w`."""
    if isinstance(w, Lora):
        return lora_axes(w, stored_axes(spec, w.base), spec.matrix_axes)
    return matrix_axes(w, *spec.matrix_axes) if isinstance(w, QuantizedMatrix) else spec.axes


def map_arrays(function: Callable, specs: SpecTree | ParamSpec, params):
    """The tree of `function(array, logical axes)` for every array that stores a parameter."""

    def mapped(spec: ParamSpec, w):
        return jax.tree.map(function, w, stored_axes(spec, w))

    return map_specs(mapped, specs, params)


def quantize_params(config: Llama4Config, params: dict, format: str) -> dict:
    """The parameters with matrices in 8 or 4 bits.

    Routers, norms, embeddings, the vision tower and adapters stay as they are.
    """

    def stored(spec: ParamSpec, w) -> Any:
        if isinstance(w, Lora):
            return dataclasses.replace(w, base=stored(spec, w.base))
        if not spec.quantizable or isinstance(w, QuantizedMatrix):
            return w
        return quantize_matrix(w.reshape(spec.matrix_shape), format)

    return map_specs(stored, param_specs(config), params)


def abstract_params(
    config: Llama4Config, mesh, dtype=jnp.bfloat16, format: str | None = None, pads: bool = True
):
    """ShapeDtypeStructs with shardings: what a compiler or a loader needs to know.

    Args:
        format: how matrices are quantized; None for not at all.
        pads: as for `with_shardings`.

    Raises:
        UserError: if the mesh does not divide a parameter.
    """
    params = map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), param_specs(config))
    if format is not None:
        params = jax.eval_shape(lambda params: quantize_params(config, params, format), params)
    return with_shardings(config, params, mesh, pads)


def with_shardings(config: Llama4Config, params: dict, mesh, pads: bool = True) -> dict:
    """The shapes and dtypes of parameters, with the sharding that `mesh` gives each array.

    Args:
        pads: whether a vocabulary that the mesh does not divide is padded until it does, which
            `embed` and `unembed` know and files never have.

    Raises:
        UserError: if the mesh does not divide a parameter.
    """

    def shape(x, axes):
        return padded_shape(x.shape, axes, mesh) if pads else x.shape

    for name, (spec, w) in named_params(config, params).items():
        map_arrays(lambda x, axes, n=name: check_divides(n, shape(x, axes), axes, mesh), spec, w)

    def laid_out(x, axes):
        layout = sharding(mesh, param_spec(axes))
        return jax.ShapeDtypeStruct(shape(x, axes), x.dtype, sharding=layout)

    return map_arrays(laid_out, param_specs(config), params)


def unpadded(config: Llama4Config, params: dict) -> dict:
    """The parameters without padding, whose dimension is then whole on every device."""

    def cut(spec: ParamSpec, w):
        if isinstance(w, QuantizedMatrix | Lora) or w.shape == spec.shape:
            return w
        axes = tuple(None if axis in PADDED else axis for axis in spec.axes)
        layout = sharding(w.sharding.mesh, param_spec(axes))
        return jax.jit(lambda w: w[tuple(map(slice, spec.shape))], out_shardings=layout)(w)

    return map_specs(cut, param_specs(config), params)
