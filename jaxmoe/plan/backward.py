"""Computes the temporaries of a training step on one device, in bytes, by formula.

They are gradients, what the forward pass keeps of each layer, and the phase that needs most: the
gathering of a layer's weights, the backward pass of a layer's experts or of its other parts, or the
loss. The numbers of arrays of each size are those that the compiler for H100 holds at the peak;
benchmarks/train-memory.json has its figures beside the formula's.

Shape letters: T tokens, D embed, F feed-forward width, R rows of the experts' blocks, H query
heads, K key/value heads, d head size.
"""

import dataclasses

from jaxmoe.config import LayerKind
from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.share import DeviceShare, device_share
from jaxmoe.plan.targets import Target
from jaxmoe.plan.temporaries import (
    BF16,
    FP32,
    LARGEST_BLOCK,
    expert_rows,
    gathered,
    module_of,
)
from jaxmoe.plan.training import State, nbytes, numbers, state_of
from jaxmoe.plan.work import Work
from jaxmoe.train.cross_entropy import chunk_size

# Arrays [T, D], [T, H d] and [T, K d] that are held through a layer's backward pass.
HELD, HELD_OF_HEADS, HELD_OF_KEYS = 4, 4, 3
# Arrays [R, F] and [R, D] of the experts; what their matrices' gradients need is kept until then.
OF_EXPERTS = {"train": (5, 2), "lora": (4, 0), "adapted": (9, 2)}
GATHERED_WITH = 5, 3  # the same, while `fsdp` gathers the matrices of experts with adapters
EXCHANGED = 2  # arrays [items, D] in the memory that an exchange writes to, and nothing else uses
OF_SWIGLU = {"train": 6, "lora": 8}  # arrays [T, F]; beside adapters two of them are float32
OF_SWIGLU_ON_TPUS = 6  # which fuse these with what reads them
SUMMED = 8  # arrays [T, D] while gradients are summed over `tensor`, two of them float32


@dataclasses.dataclass(frozen=True)
class Temporaries:
    """Bytes of a training step on one device, by use.

    Attributes:
        gradients: of what is trained, and its copies in the dtype of computation.
        activations: what is kept of each layer from the forward pass for the backward pass.
        phase: what is allocated in the phase that needs most.
    """

    gradients: int
    activations: int
    phase: int


def training_temporaries(work: Work, mesh: MeshConfig, target: Target | None = None) -> Temporaries:
    """The temporaries of a step of the work's run.

    Args:
        target: what the devices are; None for H100s.
    """
    share, tpu = device_share(work, mesh), target is not None and target.is_tpu
    kinds = work.config.layers
    gradients = _gradients(work, state_of(work), mesh)
    activations = sum(_kept(work, mesh, share, i) for i in range(len(kinds)))
    swiglu = OF_SWIGLU_ON_TPUS if tpu else OF_SWIGLU[work.task]
    phases = [_loss(work, mesh, share), _gathering(work, mesh, share, tpu)]
    phases += [_layer(work, mesh, share, kind, swiglu) for kind in dict.fromkeys(kinds)]
    update = _update(work, mesh) - gradients - activations
    throughout = _exchanged(work, share) + _whole_embedding(work, mesh)
    return Temporaries(gradients, activations, max(*phases, update) + throughout)


def _gathering(work: Work, mesh: MeshConfig, share: DeviceShare, tpu: bool) -> int:
    """Bytes of a module's weights while `fsdp` gathers them."""
    twice = ("gate", "up") if work.training.remat != "dots" else ("gate",)  # dots: going forward
    twice = () if tpu else twice  # TPUs gather matrices in the order of their axes
    return gathered(work, mesh, module_of, twice) + 3 * _stream(work, share)


def _update(work: Work, mesh: MeshConfig) -> int:
    """Bytes of Muon's update: a float32 mean and direction of each matrix, AdamW's of embeddings.

    AdamW and Adafactor update one parameter after the other.
    """
    if work.training.optimizer.name != "muon":
        return 0
    held, config = 2 * FP32 * numbers(state_of(work).trained, mesh), work.config
    if work.task == "train":
        vocabulary = config.vocab_size * config.hidden_size // (mesh.fsdp * mesh.tensor)
        held += (FP32 + BF16) * vocabulary  # beside its gradient one array more than a matrix has
    return held


def _exchanged(work: Work, share: DeviceShare) -> int:
    """Bytes of the buffers of an all-to-all of the experts' rows."""
    items = share.group * work.config.num_experts_per_tok
    held = EXCHANGED if share.exchange == "all_to_all" else 0
    return held * items * work.config.hidden_size * BF16


def _gradients(work: Work, state: State, mesh: MeshConfig) -> int:
    """Bytes of gradients, which are kept in bfloat16 and widened where they are used.

    Parameters in float32 have copies in bfloat16, each of which is needed until its gradient is
    there, so that the two count once; but both are there where further batches follow, beside
    the float32 sums over batches. Statistics from the host's memory are all there while the
    parameters are updated.
    """
    run, elements = work.training, numbers(state.trained, mesh)
    size = BF16
    if run.accumulate > 1:
        size += FP32 + (BF16 if run.params_dtype == "float32" else 0)
    return size * elements + nbytes(state.offloaded, mesh)


def _whole_embedding(work: Work, mesh: MeshConfig) -> int:
    """Bytes of the embedding that `fsdp` gathers once for all batches of a step."""
    if work.training.accumulate == 1 or mesh.fsdp == 1:
        return 0
    return work.config.vocab_size * work.config.hidden_size // mesh.tensor * BF16


def _kept(work: Work, mesh: MeshConfig, share: DeviceShare, layer: int) -> int:
    """Bytes that a layer keeps for its backward pass, by the run's remat policy."""
    policy, kept = work.training.remat, _between(work, share)
    if policy == "attention":  # its output and log-sum-exps
        return kept + _heads(work, share) + share.tokens * share.heads * FP32
    return kept + (_products(work, mesh, share, layer) if policy == "dots" else 0)


def _products(work: Work, mesh: MeshConfig, share: DeviceShare, layer: int) -> int:
    """Bytes of a layer's products with matrices in float32, its last one's apart.

    An adapter's product is one beside its matrix's.
    """
    config, kind, adapted = work.config, work.config.layers[layer], state_of(work).adapted
    module = "feed_forward.shared" if kind.feed_forward == "moe" else "feed_forward"
    keys, width = share.kv_heads * config.head_dim, _width(work, mesh, kind)
    outputs = {
        "attention.q": share.heads * config.head_dim,
        "attention.k": keys,
        "attention.v": keys,
        "attention.o": config.hidden_size,
        f"{module}.gate": width,
        f"{module}.up": width,
    }
    copies = {name: 1 + (f"layers.{layer}.{name}" in adapted) for name in outputs}
    return FP32 * share.tokens * sum(copies[name] * size for name, size in outputs.items())


def _layer(
    work: Work, mesh: MeshConfig, share: DeviceShare, kind: LayerKind, of_swiglu: int
) -> int:
    """Bytes of the backward pass of one layer, with its weights after gathering.

    Args:
        of_swiglu: arrays [T, F] of a SwiGLU.
    """
    stream, heads, between = _stream(work, share), _heads(work, share), _between(work, share)
    width = share.tokens * _width(work, mesh, kind) * BF16
    keys = share.rows * share.kv_heads * work.config.head_dim * BF16  # of a token in each row
    held = HELD * between + HELD_OF_HEADS * heads + HELD_OF_KEYS * share.length * keys
    if share.length < work.tokens:  # keys and values of all tokens are gathered
        held += 2 * work.tokens * keys
    rows = _rows(work, mesh, share) if kind.feed_forward == "moe" else 0
    of_embed = rows * work.config.hidden_size * BF16
    phases = [2 * of_embed + of_swiglu * width]
    if between < stream:  # of what is summed, devices keep parts: experts' rows, then a gradient
        phases += [2 * of_embed + 3 * stream, of_embed + 2 * stream + 6 * width + 3 * between]
    elif mesh.tensor > 1:
        phases.append(SUMMED * stream + 3 * width)
    weights = gathered(work, mesh, twice=())
    if rows:
        of_width = rows * work.config.intermediate_size // mesh.tensor * BF16
        adapted = any(".experts." in name for name in state_of(work).adapted)
        wide, narrow = OF_EXPERTS["adapted" if adapted else work.task]
        phases.append(wide * of_width + narrow * of_embed)
        if adapted and weights:
            wide, narrow = GATHERED_WITH
            experts = work.config.num_local_experts // mesh.expert
            matrix = experts * work.config.hidden_size * of_width // rows  # its axes put in order
            phases.append(matrix + wide * of_width + narrow * of_embed + 4 * stream)
    return held + max(phases) + weights


def _loss(work: Work, mesh: MeshConfig, share: DeviceShare) -> int:
    """Bytes of the loss: a gradient of the hidden states; of a chunk logits, softmax, gradient."""
    config = work.config
    width = chunk_size(config.vocab_size // mesh.tensor, share.tokens, config.hidden_size)
    chunk = width * config.hidden_size * BF16 * (2 if mesh.fsdp > 1 else 1)
    return share.tokens * (config.hidden_size + 3 * width) * FP32 + chunk


def _rows(work: Work, mesh: MeshConfig, share: DeviceShare) -> int:
    """R, the rows of the experts on a device."""
    experts = work.config.num_local_experts
    items = share.group * work.config.num_experts_per_tok
    return expert_rows(items, experts, experts // mesh.expert, LARGEST_BLOCK[work.weights])


def _stream(work: Work, share: DeviceShare) -> int:
    """Bytes of one activation [T, D]."""
    return share.tokens * work.config.hidden_size * BF16


def _between(work: Work, share: DeviceShare) -> int:
    """Bytes of what a device has of an activation [T, D] between two layers."""
    return share.between * work.config.hidden_size * BF16


def _heads(work: Work, share: DeviceShare) -> int:
    """Bytes of the queries [T, H d]."""
    return share.tokens * share.heads * work.config.head_dim * BF16


def _width(work: Work, mesh: MeshConfig, kind: LayerKind) -> int:
    config = work.config
    is_moe = kind.feed_forward == "moe"
    return (config.intermediate_size if is_moe else config.intermediate_size_mlp) // mesh.tensor
