"""`Llama4Config`: every number of a Llama 4 model, and each layer's kind as data.

Field names are those of the Hugging Face `config.json`; `jaxmoe.hf_config` reads and writes it.
"""

import dataclasses
from typing import Literal

from jaxmoe.errors import UserError
from pallas_kernels.attention import CAUSAL, Mask, make_mask

Attention = Literal["local", "global"]
FeedForward = Literal["moe", "dense"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What a layer's attention is.

    The mask says which cache the layer keeps, too: a ring where a query sees so many positions at
    most, otherwise the full sequence.

    Attributes:
        mask: which keys a query sees; a subclass of `Mask` may say anything.
        rope: rotates queries and keys by their position; without it positions are unknown (NoPE).
        qk_norm: normalizes queries and keys after the rotation.
        temperature: scales queries by their position (`Llama4Config.attn_scale`).
    """

    mask: Mask = CAUSAL
    rope: bool = True
    qk_norm: bool = False
    temperature: bool = False


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What one decoder layer is.

    Attributes:
        attention: "local" (rotary, within one chunk, QK norm where the model has it), "global"
            (NoPE, causal, temperature), or a spec of another kind, which no `config.json` can say.
        feed_forward: "moe" or "dense".
    """

    attention: Attention | AttentionSpec
    feed_forward: FeedForward


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The `llama3` frequency scaling; with `low == high` it is a hard threshold."""

    factor: float = 16.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The sizes of Llama 4's vision tower, which sees one tile of an image at a time.

    Attributes:
        image_size, patch_size: sides of a tile and of a patch, in pixels.
        pixel_shuffle_ratio: patches along a side that become one vector, inverted.
        projector_input_dim, projector_output_dim: widths of the adapter's two matrices.
        vision_output_dim: inputs of the projector to the text model's width.
    """

    hidden_size: int = 1408
    num_hidden_layers: int = 34
    num_attention_heads: int = 16
    intermediate_size: int = 5632
    num_channels: int = 3
    image_size: int = 336
    patch_size: int = 14
    pixel_shuffle_ratio: float = 0.5
    projector_input_dim: int = 4096
    projector_output_dim: int = 4096
    vision_output_dim: int = 4096
    rope_theta: float = 10000.0

    def __post_init__(self):
        merged = self.patches_merged
        checks = {
            "image_size": (self.image_size, self.patch_size * merged),
            "hidden_size": (self.hidden_size, 4 * self.num_attention_heads),
        }
        for name, (size, unit) in checks.items():
            if size % unit:
                raise UserError(f"the vision tower's {name}={size} is not a multiple of {unit}.")
        widths = {
            "projector_output_dim": (self.projector_output_dim, self.projector_input_dim),
            "vision_output_dim": (self.vision_output_dim, self.projector_output_dim),
            "intermediate_size": (self.intermediate_size, self.hidden_size * merged**2),
        }
        for name, (size, expected) in widths.items():
            if size != expected:
                raise UserError(f"the vision tower's {name}={size} is not {expected}.")

    @property
    def head_dim(self) -> int:
        """Numbers of an attention head's query, key or value."""
        return self.hidden_size // self.num_attention_heads

    @property
    def patches_a_side(self) -> int:
        """Patches along a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patches_merged(self) -> int:
        """Patches along a side of the square that becomes one token."""
        return round(1 / self.pixel_shuffle_ratio)

    @property
    def tokens_per_tile(self) -> int:
        """Tokens that stand for a tile in the text model's sequence."""
        return (self.patches_a_side // self.patches_merged) ** 2


def check_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    """Raises a UserError unless key/value heads divide the heads, and rotary pairs a head."""
    if heads % kv_heads:
        raise UserError(
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}."
        )
    if head_dim % 2:
        raise UserError(f"head_dim={head_dim} is odd; rotary positions need pairs.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama4Config:
    """A Llama 4 model. Sizes are counts of elements; positions and lengths are in tokens.

    Attributes:
        layers: the kind of each decoder layer, first to last.
        intermediate_size: hidden width of each routed expert and of the shared expert.
        intermediate_size_mlp: hidden width of dense layers.
        attention_chunk_size: tokens a local layer attends within; None means all earlier ones.
        rope_scaling: None for unscaled frequencies (Maverick).
        floor_scale, attn_scale: of `1 + attn_scale * ln(floor((p+1) / floor_scale) + 1)`, the
            temperature of global layers.
        image_token_id: the token at each place of an image's feature.
        selection_bias: whether each router has a bias by which it chooses experts (Wang et al.,
            arXiv 2408.15664); no published Llama 4 has one.
        vision: the sizes of the vision tower; None for a model of text.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    intermediate_size_mlp: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    layers: tuple[LayerKind, ...]
    num_experts_per_tok: int = 1
    attention_chunk_size: int | None = 8192
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    use_qk_norm: bool = True
    attn_temperature_tuning: bool = True
    floor_scale: int = 8192
    attn_scale: float = 0.1
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 10485760
    tie_word_embeddings: bool = False
    bos_token_id: int = 200000
    eos_token_ids: tuple[int, ...] = (200001, 200007, 200008)
    pad_token_id: int = 200018
    image_token_id: int = 200092
    selection_bias: bool = False
    vision: VisionConfig | None = None

    def __post_init__(self):
        check_heads(self.num_attention_heads, self.num_key_value_heads, self.head_dim)
        if not 1 <= self.num_experts_per_tok <= max(1, self.num_local_experts):
            raise UserError(
                f"num_experts_per_tok={self.num_experts_per_tok} is not between 1 and "
                f"num_local_experts={self.num_local_experts}."
            )

    @property
    def num_hidden_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layers)

    def attention_spec(self, kind: LayerKind) -> AttentionSpec:
        """What the attention of a layer of some kind is."""
        if isinstance(kind.attention, AttentionSpec):
            return kind.attention
        if kind.attention == "global":
            return AttentionSpec(rope=False, temperature=True)
        mask = make_mask(chunk=self.attention_chunk_size)
        return AttentionSpec(mask=mask, qk_norm=self.use_qk_norm)

    @property
    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """What the attention of each layer is, first to last."""
        return tuple(self.attention_spec(kind) for kind in self.layers)


def vision_of(config: Llama4Config) -> VisionConfig:
    """The sizes of the model's vision tower.

    Raises:
        UserError: if there is none.
    """
    if config.vision is None:
        raise UserError(
            "the model has no vision tower; use a multimodal checkpoint, converted without "
            "--text-only."
        )
    return config.vision


def layer_kinds(
    num_layers: int, nope_interval: int = 4, moe_step: int = 1
) -> tuple[LayerKind, ...]:
    """Llama 4's rule: every `nope_interval`-th layer is global, every `moe_step`-th is MoE."""
    return tuple(
        LayerKind(
            "global" if (i + 1) % nope_interval == 0 else "local",
            "moe" if (i + 1) % moe_step == 0 else "dense",
        )
        for i in range(num_layers)
    )


SCOUT = Llama4Config(
    vocab_size=202048,
    hidden_size=5120,
    intermediate_size=8192,
    intermediate_size_mlp=16384,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    num_local_experts=16,
    layers=layer_kinds(48),
    rope_scaling=RopeScaling(),
    use_qk_norm=True,
)

MAVERICK = dataclasses.replace(
    SCOUT,
    num_local_experts=128,
    layers=layer_kinds(48, moe_step=2),
    rope_scaling=None,
    use_qk_norm=False,
    max_position_embeddings=1048576,
)

PRESETS = {"scout": SCOUT, "maverick": MAVERICK}
