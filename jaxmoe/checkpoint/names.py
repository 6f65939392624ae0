"""The one table of tensor names: Hugging Face <-> this project, read in both directions.

A row says which of our parameters one stored tensor holds and how they are laid out in it. Large
tensors move in blocks: a block is contiguous in the stored tensor, and a slice of our parameter.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

import numpy as np

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.model.params import named_specs

BLOCK_BYTES = 96 * 2**20  # one matrix of a bfloat16 expert of Scout or Maverick fits

TEXT_PREFIX = "language_model."  # in checkpoints that also hold the vision side
VISION_PREFIXES = ("vision_model.", "multi_modal_projector.")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How parameters lie in a stored tensor.

    Attributes:
        in_axes: for a Linear's weight, stored [out, in], how many axes of our parameter are inputs;
            0 if the stored tensor has our axes in our order.
        parts: how many parameters of one shape lie side by side on the last stored axis.
    """

    in_axes: int = 0
    parts: int = 1

    def stored_axes(self, ndim: int) -> tuple[int, ...]:
        """Our axes in stored order, outermost first: outputs before inputs in a Linear's weight."""
        return (*range(self.in_axes, ndim), *range(self.in_axes))

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the stored tensor that holds parameters of `shape`."""
        if self.in_axes:
            return math.prod(shape[self.in_axes :]), math.prod(shape[: self.in_axes])
        return (*shape[:-1], self.parts * shape[-1])

    def split(self, stored: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
        """Views of a flat stored block: our parameters' blocks, each of `shape`."""
        axes = self.stored_axes(len(shape))
        stored = stored.reshape(*(shape[axis] for axis in axes[:-1]), -1)
        return [part.transpose(np.argsort(axes)) for part in np.split(stored, self.parts, axis=-1)]

    def join(self, blocks: list[np.ndarray]) -> np.ndarray:
        """A stored block, from blocks of our parameters whose axes are in stored order."""
        return np.concatenate(blocks, axis=-1)


SAME = Layout()
LINEAR = Layout(in_axes=1)
LINEAR_OF_HEADS = Layout(in_axes=2)
HALVES = Layout(parts=2)

# Stored name, layout, our names.
BEFORE_LAYERS = (("model.embed_tokens.weight", SAME, ("embed",)),)
IN_LAYERS = (  # after `model.layers.{n}.`, ours after `layers.{n}.`
    ("input_layernorm.weight", SAME, ("attention_norm",)),
    ("self_attn.q_proj.weight", LINEAR, ("attention.q",)),
    ("self_attn.k_proj.weight", LINEAR, ("attention.k",)),
    ("self_attn.v_proj.weight", LINEAR, ("attention.v",)),
    ("self_attn.o_proj.weight", LINEAR_OF_HEADS, ("attention.o",)),
    ("post_attention_layernorm.weight", SAME, ("feed_forward_norm",)),
    ("feed_forward.gate_proj.weight", LINEAR, ("feed_forward.gate",)),
    ("feed_forward.up_proj.weight", LINEAR, ("feed_forward.up",)),
    ("feed_forward.down_proj.weight", LINEAR, ("feed_forward.down",)),
    ("feed_forward.router.weight", LINEAR, ("feed_forward.router",)),
    ("feed_forward.shared_expert.gate_proj.weight", LINEAR, ("feed_forward.shared.gate",)),
    ("feed_forward.shared_expert.up_proj.weight", LINEAR, ("feed_forward.shared.up",)),
    ("feed_forward.shared_expert.down_proj.weight", LINEAR, ("feed_forward.shared.down",)),
    (
        "feed_forward.experts.gate_up_proj",
        HALVES,
        ("feed_forward.experts.gate", "feed_forward.experts.up"),
    ),
    ("feed_forward.experts.down_proj", SAME, ("feed_forward.experts.down",)),
)
AFTER_LAYERS = (
    ("model.norm.weight", SAME, ("norm",)),
    ("lm_head.weight", LINEAR, ("lm_head",)),
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A contiguous range of a stored tensor and where it goes in our parameters.

    Attributes:
        start: first element of the flat stored tensor.
        count: number of elements.
        index: the slice of each of our parameters.
        shape: the shape of that slice.
    """

    start: int
    count: int
    index: tuple[slice, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a text checkpoint.

    Attributes:
        name: its Hugging Face name, without `language_model.`.
        ours: names of the parameters that it holds.
        shape: the shape of each of those parameters.
        layout: how they lie in it.
    """

    name: str
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    layout: Layout

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the tensor itself."""
        return self.layout.stored_shape(self.shape)

    def block_shape(self, itemsize: int) -> tuple[int, ...]:
        """The largest slice of our parameter whose stored block is at most `BLOCK_BYTES`.

        Outer stored axes are halved first, so every block is contiguous.
        """
        shape = list(self.shape)
        for axis in self.layout.stored_axes(len(self.shape))[:2]:
            while shape[axis] > 1 and self._bytes(shape, itemsize) > BLOCK_BYTES:
                shape[axis] = -(-shape[axis] // 2)
        return tuple(shape)

    def _bytes(self, shape: Iterable[int], itemsize: int) -> int:
        return self.layout.parts * math.prod(shape) * itemsize

    def blocks(self, itemsize: int) -> Iterator[Block]:
        """Blocks that cover the tensor, in stored order."""
        axes = self.layout.stored_axes(len(self.shape))[:2]
        step = self.block_shape(itemsize)
        for starts in itertools.product(*(range(0, self.shape[a], step[a]) for a in axes)):
            index = [slice(0, size) for size in self.shape]
            offset, unit = 0, self._bytes(self.shape, itemsize=1)
            for axis, start in zip(axes, starts, strict=True):
                index[axis] = slice(start, min(start + step[axis], self.shape[axis]))
                unit //= self.shape[axis]
                offset += start * unit
            shape = tuple(s.stop - s.start for s in index)
            yield Block(offset, self._bytes(shape, itemsize=1), tuple(index), shape)


def stored_tensors(config: Llama4Config) -> list[StoredTensor]:
    """Every text tensor of a Hugging Face checkpoint of this configuration, in model order."""
    specs = named_specs(config)
    in_layers = (
        (f"model.layers.{n}.{stored}", layout, tuple(f"layers.{n}.{name}" for name in ours))
        for n in range(config.num_hidden_layers)
        for stored, layout, ours in IN_LAYERS
    )
    return [
        StoredTensor(stored, ours, specs[ours[0]].shape, layout)
        for stored, layout, ours in (*BEFORE_LAYERS, *in_layers, *AFTER_LAYERS)
        if ours[0] in specs  # a dense layer has no router
    ]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a checkpoint holds.

    Attributes:
        names: the stored name without `language_model.` -> the name in the file.
        left_out: names in the file that the text model does not read.
    """

    names: dict[str, str]
    left_out: list[str]


def match_names(config: Llama4Config, in_file: Iterable[str], source: str) -> Found:
    """Finds every text tensor among the names of a checkpoint, text-only or multimodal.

    Args:
        config: the model.
        in_file: the names of all its tensors.
        source: the checkpoint, for messages.

    Raises:
        UserError: naming the first tensor that is missing, unknown or there twice.
    """
    wanted = dict.fromkeys(tensor.name for tensor in stored_tensors(config))
    names: dict[str, str] = {}
    left_out = []
    for name in in_file:
        text = name.removeprefix(TEXT_PREFIX)
        if name.startswith(VISION_PREFIXES) or _is_tied_head(config, text):
            left_out.append(name)
        elif text not in wanted:
            _refuse_unknown(name, wanted, source)
        elif text in names:
            raise UserError(f"{source} holds both {names[text]} and {name}; remove one of them.")
        else:
            names[text] = name
    for name in wanted:
        if name not in names:
            raise UserError(
                f"{source} lacks the tensor {name} that its config.json asks for; "
                "download it again or correct config.json."
            )
    return Found(names, left_out)


def _is_tied_head(config: Llama4Config, name: str) -> bool:
    """A copy of the embedding, which a tied model reads instead."""
    return config.tie_word_embeddings and name == "lm_head.weight"


def _refuse_unknown(name: str, wanted: Iterable[str], source: str) -> None:
    near = get_close_matches(name.removeprefix(TEXT_PREFIX), wanted, n=1, cutoff=0)
    raise UserError(
        f"{source} holds the tensor {name}, which its config.json has no place for (the nearest "
        f"name is {near[0]}); correct config.json, or remove the tensor."
    )
