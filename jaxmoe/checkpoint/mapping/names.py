"""The one table of tensor names: those of published checkpoints and those of the parameters.

A row says which parameters one kind of stored tensor holds and how they lie in it; `tensors.expand`
makes the groups of a model from the rows, for reading and for writing. To support another format,
add rows.

In names, {n} stands for a layer, and {j} for an expert that has a tensor of its own. All experts
are laid out alike, so rows of experts describe one.
"""

import dataclasses
from typing import NamedTuple

from jaxmoe.checkpoint.mapping.layout import Layout

TEXT_PREFIX = "language_model."  # of the text model's tensors where the vision tower is there too
VISION_PREFIXES = ("vision_", "multi_modal_projector.")

SAME = Layout()
LINEAR = Layout(in_axes=1)
LINEAR_OF_HEADS = Layout(in_axes=2)
HALVES = Layout(parts=2)
PACKED = Layout(packed=True)


def has_experts(param: str) -> bool:
    """Whether a parameter's first axis is that of the experts."""
    return ".experts." in param


class Packing(NamedTuple):
    """How compressed-tensors stores a quantized matrix, beyond the format of its values.

    Attributes:
        packed: whether eight 4-bit values share an int32.
        repeats: how many outputs share a scale.
    """

    packed: bool = False
    repeats: int = 1


NOT_PACKED = Packing()


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of stored tensor.

    Attributes:
        tensor: the stored tensor's name.
        layout: how the parameters lie in it.
        params: the names of the parameters. Several that do not lie side by side (`layout.parts`)
            are stacked along the outputs.
        rank_axis: the axis of the parameters, not counting that of the experts, of which each
            model-parallel rank stores a part; None if every rank stores all of it.
        flat: whether experts and the matrices' rows are one stored axis.
        requires: a parameter without which a layer has no such tensor.
        quantized: the rows that take this one's place where the parameter is quantized, if not
            those of compressed-tensors.
    """

    tensor: str
    layout: Layout
    params: tuple[str, ...]
    rank_axis: int | None = None
    flat: bool = False
    requires: str = ""
    quantized: tuple["Row", ...] = ()

    def quantized_rows(self, packing: Packing) -> tuple["Row", ...]:
        """The rows of the quantized values and their scales, by default compressed-tensors'."""
        if self.quantized:
            return self.quantized
        (param,), module = self.params, self.tensor.removesuffix(".weight")
        name, layout = ("weight_packed", PACKED) if packing.packed else ("weight", SAME)
        scales = Layout(in_axes=1, repeats=packing.repeats)
        return (
            Row(f"{module}.{name}", layout, (f"{param}.qvalue",)),
            Row(f"{module}.weight_scale", scales, (f"{param}.scale",)),
        )


def _linear(tensor: str, param: str, layout: Layout = LINEAR) -> Row:
    return Row(f"{tensor}.weight", layout, (param,))


_LAYER, _LAYER_PARAM = "model.layers.{n}.", "layers.{n}."
_FFN, _FFN_PARAM = f"{_LAYER}feed_forward.", f"{_LAYER_PARAM}feed_forward."
_FFN_NORM = f"{_LAYER_PARAM}feed_forward_norm"

TEXT = (
    Row("model.embed_tokens.weight", SAME, ("embed",)),
    Row(f"{_LAYER}input_layernorm.weight", SAME, (f"{_LAYER_PARAM}attention_norm",)),
    *(_linear(f"{_LAYER}self_attn.{x}_proj", f"{_LAYER_PARAM}attention.{x}") for x in "qkv"),
    _linear(f"{_LAYER}self_attn.o_proj", f"{_LAYER_PARAM}attention.o", LINEAR_OF_HEADS),
    Row(f"{_LAYER}post_attention_layernorm.weight", SAME, (_FFN_NORM,)),
    *(_linear(f"{_FFN}{x}_proj", f"{_FFN_PARAM}{x}") for x in ("gate", "up", "down")),
    _linear(f"{_FFN}router", f"{_FFN_PARAM}router"),
    *(
        _linear(f"{_FFN}shared_expert.{x}_proj", f"{_FFN_PARAM}shared.{x}")
        for x in ("gate", "up", "down")
    ),
)
FUSED = (  # experts in one tensor
    Row(
        f"{_FFN}experts.gate_up_proj",
        HALVES,
        (f"{_FFN_PARAM}experts.gate", f"{_FFN_PARAM}experts.up"),
    ),
    Row(f"{_FFN}experts.down_proj", SAME, (f"{_FFN_PARAM}experts.down",)),
)
UNFUSED = tuple(  # a tensor for each expert
    _linear(f"{_FFN}experts.{{j}}.{x}_proj", f"{_FFN_PARAM}experts.{x}")
    for x in ("gate", "up", "down")
)
LAST = (
    Row("model.norm.weight", SAME, ("norm",)),
    _linear("lm_head", "lm_head"),
)


def _with_bias(tensor: str, param: str) -> tuple[Row, ...]:
    return (_linear(tensor, f"{param}.weight"), Row(f"{tensor}.bias", SAME, (f"{param}.bias",)))


def _norm(tensor: str, param: str) -> tuple[Row, ...]:
    return tuple(Row(f"{tensor}.{x}", SAME, (f"{param}.{x}",)) for x in ("weight", "bias"))


_TOWER, _TOWER_PARAM = "vision_model.model.layers.{n}.", "vision.layers.{n}."

VISION = (
    Row("vision_model.class_embedding", SAME, ("vision.class_embedding",)),
    Row("vision_model.positional_embedding_vlm", SAME, ("vision.position_embedding",)),
    _linear("vision_model.patch_embedding.linear", "vision.patch_embedding"),
    *_norm("vision_model.layernorm_pre", "vision.norm_before"),
    *_norm(f"{_TOWER}input_layernorm", f"{_TOWER_PARAM}attention_norm"),
    *(
        row
        for x in "qkvo"
        for row in _with_bias(f"{_TOWER}self_attn.{x}_proj", f"{_TOWER_PARAM}attention.{x}")
    ),
    *_norm(f"{_TOWER}post_attention_layernorm", f"{_TOWER_PARAM}feed_forward_norm"),
    *_with_bias(f"{_TOWER}mlp.fc1", f"{_TOWER_PARAM}feed_forward.up"),
    *_with_bias(f"{_TOWER}mlp.fc2", f"{_TOWER_PARAM}feed_forward.down"),
    *_norm("vision_model.layernorm_post", "vision.norm_after"),
    _linear("vision_model.vision_adapter.mlp.fc1", "vision.adapter.up"),
    _linear("vision_model.vision_adapter.mlp.fc2", "vision.adapter.down"),
    _linear("multi_modal_projector.linear_1", "vision.projector"),
)


# Meta's files: one for each model-parallel rank.


def _column_parallel(tensor: str, *params: str) -> Row:
    """A Linear of which each rank stores some outputs, of stacked parameters some of each."""
    return Row(tensor, LINEAR, params, rank_axis=1)


def _row_parallel(tensor: str, param: str, layout: Layout = LINEAR) -> Row:
    """A Linear of which each rank stores some inputs."""
    return Row(tensor, layout, (param,), rank_axis=0)


def _replicated(tensor: str, param: str, requires: str = "") -> Row:
    """A tensor that every rank stores whole."""
    return Row(tensor, SAME, (param,), requires=requires)


def _meta_expert(tensor: str, param: str, short: str, rank_axis: int) -> Row:
    """The experts' matrices, [experts * inputs, outputs] on each rank.

    In fp8, a rank that stores some outputs has the scales of these outputs, and one that stores
    some inputs a scale per output for these inputs.
    """
    scales = f"{_META}experts.{short}.scale"
    scale = Row(scales, SAME, (f"{param}.scale",), rank_axis, flat=True)
    qvalue = Row(tensor, LINEAR, (f"{param}.qvalue",), 1 - rank_axis, flat=True)
    return Row(tensor, SAME, (param,), rank_axis, flat=True, quantized=(qvalue, scale))


_META = "layers.{n}.feed_forward."
_WQKV = "layers.{n}.attention.wqkv."

META_TEXT = (
    Row("tok_embeddings.weight", SAME, ("embed",), rank_axis=0),
    _replicated(f"{_WQKV}layer_norm_weight", f"{_LAYER_PARAM}attention_norm"),
    _column_parallel(f"{_WQKV}weight", *(f"{_LAYER_PARAM}attention.{x}" for x in "qkv")),
    _row_parallel("layers.{n}.attention.wo.weight", f"{_LAYER_PARAM}attention.o", LINEAR_OF_HEADS),
    _replicated(f"{_META}norm.weight", _FFN_NORM, requires=f"{_FFN_PARAM}router"),
    _replicated(
        f"{_META}mlp.layer_norm_weight",
        _FFN_NORM,
        requires=f"{_FFN_PARAM}gate",
    ),
    _column_parallel(f"{_META}mlp.fc1_weight", f"{_FFN_PARAM}gate", f"{_FFN_PARAM}up"),
    _row_parallel(f"{_META}mlp.fc2_weight", f"{_FFN_PARAM}down"),
    _replicated(f"{_META}router_DE", f"{_FFN_PARAM}router"),
    _column_parallel(f"{_META}w_in_shared_FD.weight", f"{_FFN_PARAM}shared.gate"),
    _column_parallel(f"{_META}w_swiglu_FD.weight", f"{_FFN_PARAM}shared.up"),
    _row_parallel(f"{_META}w_out_shared_DF.weight", f"{_FFN_PARAM}shared.down"),
    _meta_expert(f"{_META}experts.moe_w_in_eD_F", f"{_FFN_PARAM}experts.gate", "w1", 1),
    _meta_expert(f"{_META}experts.moe_w_swiglu_eD_F", f"{_FFN_PARAM}experts.up", "w3", 1),
    _meta_expert(f"{_META}experts.moe_w_out_eF_D", f"{_FFN_PARAM}experts.down", "w2", 0),
    _replicated("norm.weight", "norm"),
    _column_parallel("output.weight", "lm_head"),
)

_EYE = "vision_embeddings.vision_encoder."
_BLOCK = f"{_EYE}transformer.resblocks.{{n}}."


def _column_parallel_with_bias(tensor: str, param: str) -> tuple[Row, ...]:
    return (
        _column_parallel(f"{tensor}.weight", f"{param}.weight"),
        Row(f"{tensor}.bias", SAME, (f"{param}.bias",), rank_axis=0),
    )


def _row_parallel_with_bias(tensor: str, param: str) -> tuple[Row, ...]:
    return (
        _row_parallel(f"{tensor}.weight", f"{param}.weight"),
        _replicated(f"{tensor}.bias", f"{param}.bias"),
    )


META_VISION = (
    _replicated(f"{_EYE}class_embedding", "vision.class_embedding"),
    _replicated(f"{_EYE}positional_embedding_vlm", "vision.position_embedding"),
    _column_parallel(f"{_EYE}conv1._linear.weight", "vision.patch_embedding"),
    *_norm(f"{_EYE}ln_pre", "vision.norm_before"),
    *_norm(f"{_BLOCK}ln_1", f"{_TOWER_PARAM}attention_norm"),
    *(
        row
        for x in "qkv"
        for row in _column_parallel_with_bias(f"{_BLOCK}attn.w{x}", f"{_TOWER_PARAM}attention.{x}")
    ),
    *_row_parallel_with_bias(f"{_BLOCK}attn.wo", f"{_TOWER_PARAM}attention.o"),
    *_norm(f"{_BLOCK}ln_2", f"{_TOWER_PARAM}feed_forward_norm"),
    *_column_parallel_with_bias(f"{_BLOCK}mlp.c_fc", f"{_TOWER_PARAM}feed_forward.up"),
    *_row_parallel_with_bias(f"{_BLOCK}mlp.c_proj", f"{_TOWER_PARAM}feed_forward.down"),
    *_norm(f"{_EYE}ln_post", "vision.norm_after"),
    _column_parallel("vision_embeddings.vision_adapter.mlp.c_fc.weight", "vision.adapter.up"),
    _row_parallel("vision_embeddings.vision_adapter.mlp.c_proj.weight", "vision.adapter.down"),
    _column_parallel("vision_projection.weight", "vision.projector"),
)

# Ends of the names of tensors that no model needs.
UNUSED = (
    "rope.freqs",
    "global_gate_stats_3E",
    "running_gate_stats_3E",
    "expert_activation_DE",
    "._extra_state",
    ".weight_shape",  # of packed weights; it follows from the shape of the scales
)

# Scales of quantized activations, keys and values: their formats are chosen when a model runs.
OTHER_SCALES = (".input_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale")


def is_vision(tensor: str) -> bool:
    """Whether a stored tensor, with or without a `{rank}:`, belongs to the vision tower."""
    return tensor.rpartition(":")[2].startswith(VISION_PREFIXES)


def is_unused(tensor: str) -> bool:
    """Whether no model needs a stored tensor."""
    return tensor.endswith(UNUSED) or is_other_scale(tensor)


def is_other_scale(tensor: str) -> bool:
    """Whether a stored tensor is a scale of activations, keys or values."""
    return tensor.endswith(OTHER_SCALES)
