"""What images take: operations, memory and tokens of the vision tower, by formula.

The tower runs as a program of its own before the step that reads its features, so that of their
temporaries the larger ones count. Checked against the compilers in tests/plan/test_plan_vision.py.
"""

import collections
import dataclasses
import math

from jaxmoe.config import Llama4Config, vision_of
from jaxmoe.errors import UserError
from jaxmoe.generation.features import TILES, batches
from jaxmoe.mesh import MeshConfig, activation_axes
from jaxmoe.plan.links import Collective
from jaxmoe.plan.work import Work, abstract_mesh, stored_params

BF16, FP32 = 2, 4


def tile_flops(config: Llama4Config) -> float:
    """Operations of one tile: products with weights, and attention of all its patches to all."""
    vision = vision_of(config)
    D, F, patches = vision.hidden_size, vision.intermediate_size, vision.patches_a_side**2
    length, tokens = patches + 1, vision.tokens_per_tile
    embedding = patches * vision.num_channels * vision.patch_size**2 * D
    block = length * (4 * D * D + 2 * D * F) + 2 * length**2 * D
    inner, outer = vision.projector_input_dim, vision.projector_output_dim
    adapter = vision.patches_merged**2 * D * inner + inner * outer + outer * config.hidden_size
    return 2.0 * (embedding + vision.num_hidden_layers * block + tokens * adapter)


def tower_flops(work: Work, mesh: MeshConfig) -> float:
    """Operations of a device for the tiles of a step."""
    here = (_tiles_here(tiles, mesh) / _sharing(tiles, mesh) for tiles in _batches(work))
    return sum(here) * tile_flops(work.config) if work.tiles else 0.0


def tower_reads(work: Work, mesh: MeshConfig) -> float:
    """Bytes of the tower's weights that a device reads for the tiles of a step."""
    reads = (sum(_parts(work, _at_use(mesh, tiles)).values()) for tiles in _batches(work))
    return float(sum(reads))


def tower_collectives(work: Work, mesh: MeshConfig) -> list[Collective]:
    """The collectives for the tiles of a step: gathered weights, and float32 sums of each layer."""
    return [x for tiles in _batches(work) for x in _batch_collectives(work, mesh, tiles)]


def _batch_collectives(work: Work, mesh: MeshConfig, tiles: int) -> list[Collective]:
    sharing, at_use = _sharing(tiles, mesh), _at_use(mesh, tiles)
    gathered = ("fsdp",) if sharing == mesh.tensor else ("fsdp", "tensor")
    found = [Collective("all-gather", gathered, sum(_parts(work, at_use).values()))]
    if sharing > 1:
        sums = 2 * vision_of(work.config).num_hidden_layers
        found.append(Collective("all-reduce", ("tensor",), _stream(work, mesh, tiles) * FP32, sums))
    return found


def tower_temporaries(work: Work, mesh: MeshConfig) -> int:
    """Bytes of temporaries of the tower for a batch of tiles: feed-forward, or an all-reduce."""
    return max((_batch_temporaries(work, mesh, tiles) for tiles in _batches(work)), default=0)


def _batch_temporaries(work: Work, mesh: MeshConfig, tiles: int) -> int:
    vision, stream = vision_of(work.config), _stream(work, mesh, tiles)
    sharing, at_use = _sharing(tiles, mesh), _at_use(mesh, tiles)
    hidden = stream * vision.intermediate_size // vision.hidden_size // sharing
    phases = [4 * stream * BF16 + hidden * (BF16 + FP32)]
    if sharing > 1:  # an all-reduce has an input and an output, in float32
        phases.append(stream * (4 * BF16 + 2 * FP32))
    if at_use == mesh:
        return max(phases)
    parts = _parts(work, at_use)  # gathered: a block's beside the block's activations
    return max(max(phases) + parts["layers 0"], *parts.values())


def _stream(work: Work, mesh: MeshConfig, tiles: int) -> int:
    """Elements of a batch's activations [tiles, patches, D] on one device."""
    vision = vision_of(work.config)
    length = vision.patches_a_side**2 + 1
    return _tiles_here(tiles, mesh) * length * vision.hidden_size


def _parts(work: Work, mesh: MeshConfig) -> dict[str, int]:
    """Bytes of weights on one device: of each block, of the adapter and of all else."""
    parts: collections.Counter[str] = collections.Counter()
    for stored in stored_params(work.config, work.format):
        if stored.is_vision:
            _, part, *rest = stored.name.split(".")
            parts[f"{part} {rest[0]}" if part == "layers" else part] += stored.nbytes(mesh)
    return parts


def _at_use(mesh: MeshConfig, tiles: int) -> MeshConfig:
    """The mesh that shards the weights as they are when a batch of tiles is computed."""
    return dataclasses.replace(mesh, fsdp=1, tensor=_sharing(tiles, mesh))


def _sharing(tiles: int, mesh: MeshConfig) -> int:
    """Devices along `tensor` that share the heads of the same tiles."""
    axes = activation_axes(abstract_mesh(mesh), "tiles", tiles)
    return 1 if "tensor" in axes else mesh.tensor


def _batches(work: Work) -> list[int]:
    """How many tiles are computed at once, one batch after the other."""
    if work.trains:
        return [work.tiles] if work.tiles else []
    return [len(batch) for batch in batches(range(work.tiles))]


def training_bytes(work: Work, mesh: MeshConfig) -> int:
    """Bytes of the tower's activations in training: each block's input, and one block's backward.

    All tiles of a batch are computed at once.
    """
    if not work.tiles:
        return 0
    stream = _stream(work, mesh, work.tiles)
    inputs = vision_of(work.config).num_hidden_layers * stream * BF16
    return inputs + 2 * tower_temporaries(work, mesh)


def features_bytes(work: Work) -> int:
    """Bytes of the engine's table of features, which every device has."""
    if not work.tiles:
        return 0
    tokens = TILES * vision_of(work.config).tokens_per_tile
    return tokens * work.config.hidden_size * BF16


def check_tiles(work: Work) -> None:
    """Raises a UserError if a step cannot see so many tiles."""
    if work.tiles and work.task == "decode":
        raise UserError(f"{work.tiles} tiles are seen by no step of decoding; use --task prefill.")
    if image_tokens(work) > work.rows * work.context:
        raise UserError(
            f"{work.tiles} tiles are {image_tokens(work)} tokens, more than {work.rows} row(s) of "
            f"{work.context}; raise the context or lower the tiles."
        )


def image_tokens(work: Work) -> int:
    """Tokens of the context that the tiles take, without separators."""
    return work.tiles * vision_of(work.config).tokens_per_tile if work.tiles else 0


def _tiles_here(tiles: int, mesh: MeshConfig) -> int:
    """Tiles of a batch on one device."""
    abstract = abstract_mesh(mesh)
    axes = activation_axes(abstract, "tiles", tiles)
    return tiles // math.prod(abstract.shape[axis] for axis in axes)
