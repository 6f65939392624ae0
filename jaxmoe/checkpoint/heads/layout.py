"""Which tensor of a published head holds which parameter."""

from collections.abc import Iterable

import jax

from jaxmoe.checkpoint.mapping.names import LINEAR, LINEAR_OF_HEADS, SAME, Row
from jaxmoe.checkpoint.mapping.tensors import Group, expand
from jaxmoe.eagle_config import EagleConfig
from jaxmoe.model.eagle import eagle_specs
from jaxmoe.model.param_spec import ParamSpec, is_spec

LAYERS = ("midlayer.", "layers.0.")  # what the layer is called, in SGLang's heads and in vLLM's
EMBED, OFFSETS, MEMBERS = "embed_tokens.weight", "d2t", "t2d"
TOKEN_IDS = "token_ids"  # beside the parameters in a checkpoint


def layer_of(tensors: Iterable[str]) -> str:
    """What the layer is called among these tensors."""
    return next((x for x in LAYERS if any(name.startswith(x) for name in tensors)), LAYERS[0])


def named_head_specs(config: EagleConfig) -> dict[str, ParamSpec]:
    """Each parameter's spec by dotted name, such as `attention.q`, in a fixed order."""
    leaves, _ = jax.tree.flatten_with_path(eagle_specs(config), is_leaf=is_spec)
    return {".".join(key.key for key in path): spec for path, spec in leaves}


def groups_of(config: EagleConfig, layer: str) -> list[Group]:
    """The tensors of a head, and the parameters in them; `layer` is one of `LAYERS`."""
    shapes = {name: spec.shape for name, spec in named_head_specs(config).items()}
    return expand(_rows(layer), shapes)


def _rows(layer: str) -> list[Row]:
    attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
    return [
        Row("fc.weight", LINEAR, ("fc",)),
        Row(f"{layer}input_layernorm.weight", SAME, ("embed_norm",)),
        Row(f"{layer}hidden_norm.weight", SAME, ("hidden_norm",)),
        *(Row(f"{attention}{x}_proj.weight", LINEAR, (f"attention.{x}",)) for x in "qkv"),
        Row(f"{attention}o_proj.weight", LINEAR_OF_HEADS, ("attention.o",)),
        Row(f"{layer}post_attention_layernorm.weight", SAME, ("feed_forward_norm",)),
        *(
            Row(f"{mlp}{x}_proj.weight", LINEAR, (f"feed_forward.{x}",))
            for x in ("gate", "up", "down")
        ),
        Row("norm.weight", SAME, ("norm",)),
        Row("lm_head.weight", LINEAR, ("lm_head",)),
    ]
