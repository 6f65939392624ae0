"""The parameters of the vision tower, declared once; so far they are only stored.

Dimension names: D tower width, F feed-forward width, T text width.
"""

from jaxmoe.config import Llama4Config, VisionConfig
from jaxmoe.model.params import ParamSpec


def vision_specs(config: Llama4Config, vision: VisionConfig) -> dict[str, ParamSpec]:
    """By dotted name, such as `vision.layers.3.attention.q.weight`."""
    D, patch = vision.hidden_size, vision.patch_size
    patches = (vision.image_size // patch) ** 2
    shuffled = round(D / vision.pixel_shuffle_ratio**2)  # patches side by side, as channels
    inner, outer = vision.projector_input_dim, vision.projector_output_dim
    specs = {
        "class_embedding": _vector(D),
        "position_embedding": ParamSpec((patches + 1, D), (None, None), ()),
        "patch_embedding": _matrix(vision.num_channels * patch**2, D),
        **_norm("norm_before", D),
    }
    for n in range(vision.num_hidden_layers):
        layer = _layer(D, vision.intermediate_size)
        specs |= {f"layers.{n}.{name}": spec for name, spec in layer.items()}
    specs |= {
        **_norm("norm_after", D),
        "adapter.up": _matrix(shuffled, inner),
        "adapter.down": _matrix(inner, outer),
        "projector": _matrix(vision.vision_output_dim, config.hidden_size),
    }
    return {f"vision.{name}": spec for name, spec in specs.items()}


def _layer(D: int, F: int) -> dict[str, ParamSpec]:
    specs = _norm("attention_norm", D) | _norm("feed_forward_norm", D)
    for name in "qkvo":
        specs |= _linear(f"attention.{name}", D, D)
    return specs | _linear("feed_forward.up", D, F) | _linear("feed_forward.down", F, D)


def _linear(name: str, inputs: int, outputs: int) -> dict[str, ParamSpec]:
    return {f"{name}.weight": _matrix(inputs, outputs), f"{name}.bias": _vector(outputs)}


def _norm(name: str, size: int) -> dict[str, ParamSpec]:
    return {f"{name}.weight": _vector(size), f"{name}.bias": _vector(size)}


def _matrix(inputs: int, outputs: int) -> ParamSpec:
    return ParamSpec((inputs, outputs), (None, None), (0,))


def _vector(size: int) -> ParamSpec:
    return ParamSpec((size,), (None,), None)
