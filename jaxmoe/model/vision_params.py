"""The parameters of the vision tower, its adapter and the projector, declared once.

Dimension names: D tower width, F feed-forward width.
"""

from jaxmoe.config import VisionConfig
from jaxmoe.model.param_spec import ParamSpec, SpecTree


def vision_specs(vision: VisionConfig, text_width: int) -> SpecTree:
    """The parameters that make tokens' features [..., text_width] of a tile's pixels."""
    D = vision.hidden_size
    pixels = vision.num_channels * vision.patch_size**2
    patches = vision.patches_a_side**2
    merged = D * vision.patches_merged**2
    inner, outer = vision.projector_input_dim, vision.projector_output_dim
    return {
        "class_embedding": ParamSpec((D,), (None,), ()),
        "position_embedding": ParamSpec((patches + 1, D), (None, None), ()),
        "patch_embedding": ParamSpec((pixels, D), (None, "embed"), (0,)),
        "norm_before": _norm(D),
        "layers": [vision_layer_specs(vision) for _ in range(vision.num_hidden_layers)],
        "norm_after": _norm(D),
        "adapter": {
            "up": ParamSpec((merged, inner), ("embed", "ffn"), (0,)),
            "down": ParamSpec((inner, outer), ("ffn", "embed"), (0,)),
        },
        "projector": ParamSpec((outer, text_width), (None, "embed"), (0,)),
    }


def vision_layer_specs(vision: VisionConfig) -> SpecTree:
    """The parameters of one block of the tower."""
    D, F = vision.hidden_size, vision.intermediate_size
    return {
        "attention_norm": _norm(D),
        "attention": {
            **{name: _linear(D, D, "embed", "heads") for name in "qkv"},
            "o": _linear(D, D, "heads", "embed"),
        },
        "feed_forward_norm": _norm(D),
        "feed_forward": {
            "up": _linear(D, F, "embed", "ffn"),
            "down": _linear(F, D, "ffn", "embed"),
        },
    }


def _linear(inputs: int, outputs: int, of_inputs: str, of_outputs: str) -> SpecTree:
    bias = None if of_outputs == "embed" else of_outputs
    return {
        "weight": ParamSpec((inputs, outputs), (of_inputs, of_outputs), (0,)),
        "bias": ParamSpec((outputs,), (bias,), None, start=0.0),
    }


def _norm(size: int) -> SpecTree:
    return {
        "weight": ParamSpec((size,), (None,), None),
        "bias": ParamSpec((size,), (None,), None, start=0.0),
    }
