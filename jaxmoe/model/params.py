"""Every parameter, declared once: shape, logical axes, initializer.

Initialization, sharding, conversion, loading and planning all read `param_specs`.

Dimension names: V vocabulary, D embed, H query heads, K key/value heads, d head dim, E experts,
F feed-forward width.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmoe.config import LayerKind, Llama4Config
from jaxmoe.mesh import check_divides, param_spec, sharding


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, the logical axis of each dimension, and how it is initialized.

    `fan_in` is the number of inputs a matmul sums over: entries start as normals of standard
    deviation `fan_in ** -0.5`. None means ones (norm weights).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fan_in: int | None

    def init(self, key: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Random values, or ones."""
        if self.fan_in is None:
            return jnp.ones(self.shape, dtype)
        return (jax.random.normal(key, self.shape) * self.fan_in**-0.5).astype(dtype)


# A tree of dicts and lists whose leaves are ParamSpecs; parameters have the same structure.
SpecTree = dict


def attention_specs(config: Llama4Config) -> SpecTree:
    """Projections of one attention block."""
    D, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    d = config.head_dim
    return {
        "q": ParamSpec((D, H, d), ("embed", "heads", None), D),
        "k": ParamSpec((D, K, d), ("embed", "kv_heads", None), D),
        "v": ParamSpec((D, K, d), ("embed", "kv_heads", None), D),
        "o": ParamSpec((H, d, D), ("heads", None, "embed"), H * d),
    }


def swiglu_specs(D: int, F: int) -> SpecTree:
    """A dense layer, or the shared expert."""
    return {
        "gate": ParamSpec((D, F), ("embed", "ffn"), D),
        "up": ParamSpec((D, F), ("embed", "ffn"), D),
        "down": ParamSpec((F, D), ("ffn", "embed"), F),
    }


def moe_specs(config: Llama4Config) -> SpecTree:
    """Router, shared expert and routed experts of one layer."""
    D, F, E = config.hidden_size, config.intermediate_size, config.num_local_experts
    return {
        "router": ParamSpec((D, E), ("embed", None), D),
        "shared": swiglu_specs(D, F),
        "experts": {
            "gate": ParamSpec((E, D, F), ("expert", "embed", "ffn"), D),
            "up": ParamSpec((E, D, F), ("expert", "embed", "ffn"), D),
            "down": ParamSpec((E, F, D), ("expert", "ffn", "embed"), F),
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
    """The whole text model; `layers` is a list, first layer first."""
    D, V = config.hidden_size, config.vocab_size
    specs = {
        "embed": ParamSpec((V, D), ("vocab", "embed"), 1),
        "layers": [layer_specs(config, kind) for kind in config.layers],
        "norm": ParamSpec((D,), (None,), None),
    }
    if not config.tie_word_embeddings:
        specs["lm_head"] = ParamSpec((D, V), ("embed", "vocab"), D)
    return specs


def is_spec(x) -> bool:
    """For `is_leaf` of tree functions."""
    return isinstance(x, ParamSpec)


def map_specs(function: Callable, specs: SpecTree, *rest):
    """`jax.tree.map` over specs (and parameter trees of the same structure)."""
    return jax.tree.map(function, specs, *rest, is_leaf=is_spec)


def named_specs(config: Llama4Config) -> dict[str, ParamSpec]:
    """Dotted name, such as `layers.3.attention.q`, to spec, in a fixed order."""
    leaves, _ = jax.tree.flatten_with_path(param_specs(config), is_leaf=is_spec)
    return {
        ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): spec
        for path, spec in leaves
    }


def num_params(config: Llama4Config) -> int:
    """Parameters of the text model."""
    return sum(math.prod(spec.shape) for spec in named_specs(config).values())


def init_params(config: Llama4Config, key: jax.Array, dtype=jnp.float32):
    """Random parameters: a tree of arrays like `param_specs`."""
    specs = param_specs(config)
    leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten([spec.init(k, dtype) for spec, k in zip(leaves, keys, strict=True)])


def abstract_params(config: Llama4Config, mesh, dtype=jnp.bfloat16):
    """ShapeDtypeStructs with shardings: what a compiler or a loader needs to know.

    Raises:
        UserError: if the mesh does not divide a parameter.
    """
    for name, spec in named_specs(config).items():
        check_divides(name, spec.shape, spec.axes, mesh)
    return map_specs(
        lambda spec: jax.ShapeDtypeStruct(
            spec.shape, dtype, sharding=sharding(mesh, param_spec(spec.axes))
        ),
        param_specs(config),
    )
