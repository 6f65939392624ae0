"""The one table of tensor names: files of others <-> this project's parameters.

A row says which of our parameters one stored tensor holds and how they lie in it; `tensors.py`
reads the rows in both directions. Another format is other rows.

In names, {n} is a layer and {j} an expert that has a tensor of its own. All experts are laid out
alike, so rows of experts tell of one.
"""

import dataclasses

EACH = ".experts."  # in our name: the first axis is that of the experts

TEXT_PREFIX = "language_model."  # in Hugging Face checkpoints that also hold the vision side
VISION_PREFIXES = ("vision_", "multi_modal_projector.")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How parameters lie in a stored tensor.

    Attributes:
        in_axes: for a Linear's weight, stored [out, in], how many axes of our parameter are inputs;
            0 if the stored tensor has our axes in our order.
        parts: how many parameters of one shape lie side by side on the last stored axis.
        packed: eight values of 4 bits in an int32, the first lowest, each with 8 added.
        repeats: how many outputs of a Linear a stored one stands for; the last may have fewer.
    """

    in_axes: int = 0
    parts: int = 1
    packed: bool = False
    repeats: int = 1


SAME = Layout()
LINEAR = Layout(in_axes=1)
LINEAR_OF_HEADS = Layout(in_axes=2)
HALVES = Layout(parts=2)
PACKED = Layout(packed=True)


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of stored tensor.

    Attributes:
        stored: its name.
        layout: how the parameters lie in it.
        ours: our names; several that are stacked follow each other along the outputs.
        ranks: the axis of ours (after that of the experts) of which each model-parallel rank has a
            part; None if all ranks have all of it.
        flat: experts and rows are one stored axis.
        beside: a parameter of ours without which the row means nothing in a layer.
        quantized: the rows that hold the same parameter where it is quantized; see `in_bits`.
    """

    stored: str
    layout: Layout
    ours: tuple[str, ...]
    ranks: int | None = None
    flat: bool = False
    beside: str = ""
    quantized: tuple["Row", ...] = ()

    def in_bits(self, packed: bool, repeats: int) -> tuple["Row", ...]:
        """The rows of a quantized matrix and its scales, as compressed-tensors names them.

        Args:
            packed: whether 4-bit values are in words of 32.
            repeats: how many outputs share a scale.
        """
        if self.quantized:
            return self.quantized
        (ours,), stem = self.ours, self.stored.removesuffix(".weight")
        name, layout = ("weight_packed", PACKED) if packed else ("weight", SAME)
        return (
            Row(f"{stem}.{name}", layout, (f"{ours}.qvalue",)),
            Row(f"{stem}.weight_scale", Layout(in_axes=1, repeats=repeats), (f"{ours}.scale",)),
        )


def _linear(stored: str, ours: str, layout: Layout = LINEAR) -> Row:
    return Row(f"{stored}.weight", layout, (ours,))


_LAYER, _OURS = "model.layers.{n}.", "layers.{n}."
_FFN, _OUR_FFN = f"{_LAYER}feed_forward.", f"{_OURS}feed_forward."

TEXT = (
    Row("model.embed_tokens.weight", SAME, ("embed",)),
    Row(f"{_LAYER}input_layernorm.weight", SAME, (f"{_OURS}attention_norm",)),
    *(_linear(f"{_LAYER}self_attn.{x}_proj", f"{_OURS}attention.{x}") for x in "qkv"),
    _linear(f"{_LAYER}self_attn.o_proj", f"{_OURS}attention.o", LINEAR_OF_HEADS),
    Row(f"{_LAYER}post_attention_layernorm.weight", SAME, (f"{_OURS}feed_forward_norm",)),
    *(_linear(f"{_FFN}{x}_proj", f"{_OUR_FFN}{x}") for x in ("gate", "up", "down")),
    _linear(f"{_FFN}router", f"{_OUR_FFN}router"),
    *(
        _linear(f"{_FFN}shared_expert.{x}_proj", f"{_OUR_FFN}shared.{x}")
        for x in ("gate", "up", "down")
    ),
)
FUSED = (  # experts in one tensor
    Row(
        f"{_FFN}experts.gate_up_proj",
        HALVES,
        (f"{_OUR_FFN}experts.gate", f"{_OUR_FFN}experts.up"),
    ),
    Row(f"{_FFN}experts.down_proj", SAME, (f"{_OUR_FFN}experts.down",)),
)
UNFUSED = tuple(  # a tensor for each expert
    _linear(f"{_FFN}experts.{{j}}.{x}_proj", f"{_OUR_FFN}experts.{x}")
    for x in ("gate", "up", "down")
)
LAST = (
    Row("model.norm.weight", SAME, ("norm",)),
    _linear("lm_head", "lm_head"),
)


def _with_bias(stored: str, ours: str) -> tuple[Row, ...]:
    return (_linear(stored, f"{ours}.weight"), Row(f"{stored}.bias", SAME, (f"{ours}.bias",)))


def _norm(stored: str, ours: str) -> tuple[Row, ...]:
    return tuple(Row(f"{stored}.{x}", SAME, (f"{ours}.{x}",)) for x in ("weight", "bias"))


_TOWER, _OUR_TOWER = "vision_model.model.layers.{n}.", "vision.layers.{n}."

VISION = (
    Row("vision_model.class_embedding", SAME, ("vision.class_embedding",)),
    Row("vision_model.positional_embedding_vlm", SAME, ("vision.position_embedding",)),
    _linear("vision_model.patch_embedding.linear", "vision.patch_embedding"),
    *_norm("vision_model.layernorm_pre", "vision.norm_before"),
    *_norm(f"{_TOWER}input_layernorm", f"{_OUR_TOWER}attention_norm"),
    *(
        row
        for x in "qkvo"
        for row in _with_bias(f"{_TOWER}self_attn.{x}_proj", f"{_OUR_TOWER}attention.{x}")
    ),
    *_norm(f"{_TOWER}post_attention_layernorm", f"{_OUR_TOWER}feed_forward_norm"),
    *_with_bias(f"{_TOWER}mlp.fc1", f"{_OUR_TOWER}feed_forward.up"),
    *_with_bias(f"{_TOWER}mlp.fc2", f"{_OUR_TOWER}feed_forward.down"),
    *_norm("vision_model.layernorm_post", "vision.norm_after"),
    _linear("vision_model.vision_adapter.mlp.fc1", "vision.adapter.up"),
    _linear("vision_model.vision_adapter.mlp.fc2", "vision.adapter.down"),
    _linear("multi_modal_projector.linear_1", "vision.projector"),
)


# Meta's files: one for each model-parallel rank.


def _columns(stored: str, *ours: str) -> Row:
    """A Linear of which each rank has some outputs; of several stacked ones some of each."""
    return Row(stored, LINEAR, ours, ranks=1)


def _rows(stored: str, ours: str, layout: Layout = LINEAR) -> Row:
    """A Linear of which each rank has some inputs."""
    return Row(stored, layout, (ours,), ranks=0)


def _whole(stored: str, ours: str, beside: str = "") -> Row:
    return Row(stored, SAME, (ours,), beside=beside)


def _meta_expert(stored: str, ours: str, short: str, ranks: int) -> Row:
    """[experts * in, out] on each rank; in fp8 with a scale for each output and rank."""
    # A rank's part of the outputs has their scales; a part of the inputs has scales of its own.
    scale = Row(f"{_META}experts.{short}.scale", SAME, (f"{ours}.scale",), ranks, flat=True)
    qvalue = Row(stored, LINEAR, (f"{ours}.qvalue",), 1 - ranks, flat=True)
    return Row(stored, SAME, (ours,), ranks, flat=True, quantized=(qvalue, scale))


_META = "layers.{n}.feed_forward."
_WQKV = "layers.{n}.attention.wqkv."

META_TEXT = (
    Row("tok_embeddings.weight", SAME, ("embed",), ranks=0),
    _whole(f"{_WQKV}layer_norm_weight", f"{_OURS}attention_norm"),
    _columns(f"{_WQKV}weight", *(f"{_OURS}attention.{x}" for x in "qkv")),
    _rows("layers.{n}.attention.wo.weight", f"{_OURS}attention.o", LINEAR_OF_HEADS),
    _whole(f"{_META}norm.weight", f"{_OURS}feed_forward_norm", beside=f"{_OUR_FFN}router"),
    _whole(f"{_META}mlp.layer_norm_weight", f"{_OURS}feed_forward_norm", beside=f"{_OUR_FFN}gate"),
    _columns(f"{_META}mlp.fc1_weight", f"{_OUR_FFN}gate", f"{_OUR_FFN}up"),
    _rows(f"{_META}mlp.fc2_weight", f"{_OUR_FFN}down"),
    _whole(f"{_META}router_DE", f"{_OUR_FFN}router"),
    _columns(f"{_META}w_in_shared_FD.weight", f"{_OUR_FFN}shared.gate"),
    _columns(f"{_META}w_swiglu_FD.weight", f"{_OUR_FFN}shared.up"),
    _rows(f"{_META}w_out_shared_DF.weight", f"{_OUR_FFN}shared.down"),
    _meta_expert(f"{_META}experts.moe_w_in_eD_F", f"{_OUR_FFN}experts.gate", "w1", 1),
    _meta_expert(f"{_META}experts.moe_w_swiglu_eD_F", f"{_OUR_FFN}experts.up", "w3", 1),
    _meta_expert(f"{_META}experts.moe_w_out_eF_D", f"{_OUR_FFN}experts.down", "w2", 0),
    _whole("norm.weight", "norm"),
    _columns("output.weight", "lm_head"),
)

_EYE = "vision_embeddings.vision_encoder."
_BLOCK = f"{_EYE}transformer.resblocks.{{n}}."


def _columns_with_bias(stored: str, ours: str) -> tuple[Row, ...]:
    return (
        _columns(f"{stored}.weight", f"{ours}.weight"),
        Row(f"{stored}.bias", SAME, (f"{ours}.bias",), ranks=0),
    )


def _rows_with_bias(stored: str, ours: str) -> tuple[Row, ...]:
    return (_rows(f"{stored}.weight", f"{ours}.weight"), _whole(f"{stored}.bias", f"{ours}.bias"))


META_VISION = (
    _whole(f"{_EYE}class_embedding", "vision.class_embedding"),
    _whole(f"{_EYE}positional_embedding_vlm", "vision.position_embedding"),
    _columns(f"{_EYE}conv1._linear.weight", "vision.patch_embedding"),
    *_norm(f"{_EYE}ln_pre", "vision.norm_before"),
    *_norm(f"{_BLOCK}ln_1", f"{_OUR_TOWER}attention_norm"),
    *(
        row
        for x in "qkv"
        for row in _columns_with_bias(f"{_BLOCK}attn.w{x}", f"{_OUR_TOWER}attention.{x}")
    ),
    *_rows_with_bias(f"{_BLOCK}attn.wo", f"{_OUR_TOWER}attention.o"),
    *_norm(f"{_BLOCK}ln_2", f"{_OUR_TOWER}feed_forward_norm"),
    *_columns_with_bias(f"{_BLOCK}mlp.c_fc", f"{_OUR_TOWER}feed_forward.up"),
    *_rows_with_bias(f"{_BLOCK}mlp.c_proj", f"{_OUR_TOWER}feed_forward.down"),
    *_norm(f"{_EYE}ln_post", "vision.norm_after"),
    _columns("vision_embeddings.vision_adapter.mlp.c_fc.weight", "vision.adapter.up"),
    _rows("vision_embeddings.vision_adapter.mlp.c_proj.weight", "vision.adapter.down"),
    _columns("vision_projection.weight", "vision.projector"),
)

# What no model needs, by the end of its name.
UNUSED = (
    "rope.freqs",
    "global_gate_stats_3E",
    "running_gate_stats_3E",
    "expert_activation_DE",
    "._extra_state",
    ".weight_shape",  # of packed weights; the scales say it too
)

# Of quantized inputs, outputs and caches, whose formats are chosen anew when a model runs.
OTHER_SCALES = (".input_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale")


def is_vision(name: str) -> bool:
    """Whether a stored tensor, perhaps of a model-parallel rank, belongs to the vision side."""
    return name.rpartition(":")[2].startswith(VISION_PREFIXES)


def is_unused(name: str) -> bool:
    """Whether no model needs a stored tensor."""
    return name.endswith(UNUSED) or is_other_scale(name)


def is_other_scale(name: str) -> bool:
    """Whether a stored tensor is a scale of something that is not stored."""
    return name.endswith(OTHER_SCALES)
