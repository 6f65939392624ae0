"""How parameters lie in the tensors of files: the rows of `names.py` for one model.

A `Group` is one parameter, or two that a tensor holds side by side, with the tensors that hold it:
one, one for each expert, or one for each model-parallel rank. Of each tensor it knows the pieces
that are contiguous there and a slice of our parameter; large pieces move in blocks.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.checkpoint.mapping.names import EACH, Layout, Row
from jaxmoe.config import Llama4Config
from jaxmoe.model.params import named_specs

BLOCK_BYTES = 2**25  # what is read at once, and one file


class Format(NamedTuple):
    """How a matrix is quantized: "int8", "fp8" or "int4", and how many inputs share a scale."""

    name: str
    width: int


def array_shapes(
    config: Llama4Config, formats: Mapping[str, Format], specs: Mapping | None = None
) -> dict[str, tuple[int, ...]]:
    """The shape of every array that a checkpoint has on disk, by dotted name, in a fixed order.

    Args:
        formats: of the quantized parameters, by name.
        specs: default: those of the text model.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, spec in (specs or named_specs(config)).items():
        if name not in formats:
            shapes[name] = spec.shape
            continue
        *outer, inputs, outputs = spec.matrix_shape
        kind, width = formats[name]
        stored = inputs // 2 if kind == "int4" else inputs
        shapes[f"{name}.qvalue"] = (*outer, outputs, stored)
        shapes[f"{name}.scale"] = (*outer, inputs // width, outputs)
    return shapes


def main_dtype(nbytes: Mapping[str, int], stated: Any) -> str:
    """The dtype of a model: of several, the one that its configuration states, or of most bytes.

    Args:
        nbytes: in each dtype, of what is not quantized.
    """
    is_there = isinstance(stated, str) and stated in nbytes
    return stated if is_there else max(nbytes, key=lambda dtype: nbytes[dtype])


class Block(NamedTuple):
    """A contiguous range of a stored tensor, and where it goes in our parameters.

    `start` and `count` are in elements of the stored tensor; `shape` is that of the slice `index`,
    without the axis of experts.
    """

    start: int
    count: int
    index: tuple[slice, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A contiguous part of a tensor, which holds a slice of each parameter of its group.

    Attributes:
        tensor: the stored tensor's name.
        start: its first element there.
        expert: whose matrix it is a part of; None if the parameter has no experts.
        origin: where the slice begins in the parameter, without the axis of experts.
        shape: of the slice, likewise.
        layout: how it is stored.
    """

    tensor: str
    start: int
    expert: int | None
    origin: tuple[int, ...]
    shape: tuple[int, ...]
    layout: Layout

    def block_shape(self, itemsize: int) -> tuple[int, ...]:
        """The largest slice whose stored block is at most `BLOCK_BYTES`, and divides the piece.

        Outer stored axes are cut first, so every block is contiguous.
        """
        shape = list(self.shape)
        if self.layout.repeats > 1:
            return self.shape  # scales, which are few
        for axis in stored_axes(self.layout, len(shape))[:2]:
            rest = self.layout.parts * itemsize * math.prod(shape) // shape[axis]
            shape[axis] = _fitting(shape[axis], max(1, BLOCK_BYTES // rest))
        return tuple(shape)

    def blocks(self, itemsize: int) -> Iterator[Block]:
        """Blocks that cover the piece, in stored order."""
        axes = stored_axes(self.layout, len(self.shape))[:2]
        step = self.block_shape(itemsize)
        count = stored_size(self.layout, step)
        experts = () if self.expert is None else (slice(self.expert, self.expert + 1),)
        starts = itertools.product(*(range(0, self.shape[a], step[a]) for a in axes))
        for i, start in enumerate(starts):
            begin = list(self.origin)
            for axis, offset in zip(axes, start, strict=True):
                begin[axis] += offset
            index = tuple(slice(b, b + size) for b, size in zip(begin, step, strict=True))
            yield Block(self.start + i * count, count, (*experts, *index), step)


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that lie together in the same tensors.

    Attributes:
        ours: their names.
        shape: of each of them.
        layout: how they lie in the tensors.
        tensors: the shape of each stored tensor, by name.
        pieces: in the order of the tensors, and contiguous within one.
        copies: tensors with the same content as the first.
    """

    ours: tuple[str, ...]
    shape: tuple[int, ...]
    layout: Layout
    tensors: dict[str, tuple[int, ...]]
    pieces: tuple[Piece, ...]
    copies: tuple[str, ...] = ()

    def block_shape(self, itemsize: int) -> tuple[int, ...]:
        """Of our parameters: what is written at once."""
        experts = (1,) if EACH in self.ours[0] else ()
        return (*experts, *self.pieces[0].block_shape(itemsize))


def _fitting(size: int, room: int) -> int:
    """The largest part of an axis that fits, if possible by halving it, as devices divide it."""
    half = size
    while half > room and half % 2 == 0:
        half //= 2
    if half <= room:
        return half
    return next(part for part in range(room, 0, -1) if size % part == 0)


def stored_axes(layout: Layout, ndim: int) -> tuple[int, ...]:
    """Our axes in stored order, outermost first: outputs before inputs in a Linear's weight."""
    return (*range(layout.in_axes, ndim), *range(layout.in_axes))


def stored_shape(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the stored matrix or vector that holds parameters of `shape`."""
    if layout.in_axes:
        outputs = math.prod(shape[layout.in_axes :])
        return -(-outputs // layout.repeats), math.prod(shape[: layout.in_axes])
    last = shape[-1] // 4 if layout.packed else layout.parts * shape[-1]
    return (*shape[:-1], last)


def stored_size(layout: Layout, shape: tuple[int, ...]) -> int:
    """Elements of the stored block that holds parameters of `shape`."""
    return math.prod(stored_shape(layout, shape))


def split(
    layout: Layout, stored: np.ndarray, shape: tuple[int, ...], width: int = 0
) -> list[np.ndarray]:
    """Our parameters' blocks, each of `shape`, from a flat stored block; views where that can be.

    Args:
        width: of packed values, how many share a scale.
    """
    if layout.packed:
        return [_repacked(stored.view(np.uint8).reshape(shape), width)]
    axes = stored_axes(layout, len(shape))
    if layout.repeats > 1:
        rows = stored.reshape(stored_shape(layout, shape))
        stored = np.repeat(rows, layout.repeats, axis=0)[: shape[-1]]
    stored = stored.reshape(*(shape[axis] for axis in axes[:-1]), -1)
    return [part.transpose(np.argsort(axes)) for part in np.split(stored, layout.parts, axis=-1)]


def join(layout: Layout, blocks: list[np.ndarray]) -> np.ndarray:
    """A stored block, from blocks of our parameters: the inverse of `split`."""
    assert not layout.packed and layout.repeats == 1
    axes = stored_axes(layout, blocks[0].ndim)
    return np.concatenate([block.transpose(axes) for block in blocks], axis=-1)


def _repacked(stored: np.ndarray, width: int) -> np.ndarray:
    """Nibbles in the order of `pallas_kernels.quantized`, and without the 8 that was added."""
    nibbles = np.stack([stored & 15, stored >> 4], axis=-1).astype(np.int8) - 8
    values = nibbles.reshape(stored.shape[0], -1, width)
    half = width // 2
    packed = (values[..., :half] & 15) | (values[..., half:] << 4)
    return packed.reshape(stored.shape).astype(np.int8)


def expand(
    rows: Iterable[Row],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    ranks: int | None = None,
    packed: Collection[str] = (),
    repeats: Mapping[str, int] | None = None,
) -> list[Group]:
    """The groups of a model, in the order of the rows, layer by layer.

    Args:
        rows: what the files hold.
        shapes: of our arrays, by name; rows of others are skipped.
        ranks: of a model-parallel checkpoint, whose tensors are named `{rank}:{name}`.
        packed: parameters whose 4-bit values are in words of 32.
        repeats: how many outputs share a scale, of parameters where it is not one.

    Raises:
        ValueError: if the ranks cannot share a parameter evenly.
    """
    groups = []
    quantized = {
        name: (name in packed, (repeats or {}).get(name, 1)) for name in _quantized(shapes)
    }
    for _, some in itertools.groupby(rows, lambda row: row.stored.partition("{n}")[0:2]):
        alike = list(some)
        for n in itertools.count():
            found = [g for row in alike for g in _groups(row, n, shapes, ranks, quantized)]
            groups += found
            if not found or "{n}" not in alike[0].stored:
                break
    return groups


def _quantized(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """The parameters that are stored as values and scales."""
    return (name.removesuffix(".qvalue") for name in shapes if name.endswith(".qvalue"))


def _groups(row: Row, n: int, shapes, ranks: int | None, quantized) -> list[Group]:
    """Those of one layer: one, or one for each parameter that is stacked in a tensor."""
    names = tuple(name.replace("{n}", str(n)) for name in row.ours)
    if row.beside and row.beside.replace("{n}", str(n)) not in shapes:
        return []
    if names[0] in quantized:
        rows = row.in_bits(*quantized[names[0]])
        return [group for each in rows for group in _groups(each, n, shapes, ranks, quantized)]
    if names[0] not in shapes:
        return []
    stored = row.stored.replace("{n}", str(n))
    if row.layout.parts > 1:
        return [_group(row, stored, names, shapes[names[0]], ranks, 0, None)]
    parts = [_part(row, shapes[name], ranks) for name in names]
    sizes = [stored_shape(row.layout, part) for part in parts]
    whole = (sum(size[0] for size in sizes), *sizes[0][1:])
    before, groups = 0, []
    for name, size in zip(names, sizes, strict=True):
        groups.append(_group(row, stored, (name,), shapes[name], ranks, before, whole))
        before += math.prod(size)
    return groups


def _part(row: Row, shape: tuple[int, ...], ranks: int | None) -> tuple[int, ...]:
    """What one tensor holds of a parameter, of one expert if it has some."""
    part = list(shape[1:] if EACH in row.ours[0] else shape)
    if ranks is not None and row.ranks is not None:
        if part[row.ranks] % ranks:
            raise ValueError(f"{ranks} ranks cannot share {row.ours[0]} {shape} evenly")
        part[row.ranks] //= ranks
    return tuple(part)


def _group(row: Row, stored: str, ours, shape, ranks: int | None, before: int, whole) -> Group:
    """All pieces of parameters of one shape.

    Args:
        before: elements of a tensor that come before the first piece.
        whole: the shape of the tensor for one expert; None if it holds nothing else.
    """
    part = _part(row, shape, ranks)
    whole = whole or stored_shape(row.layout, part)
    experts = range(shape[0]) if EACH in ours[0] else (None,)
    together = _together(row, whole, len(experts)) if experts[0] is not None else whole
    tensors, pieces, copies = {}, [], []
    for rank in range(ranks or 1):
        name = stored if ranks is None else f"{rank}:{stored}"
        if rank and row.ranks is None:
            copies.append(name)
            continue
        origin = tuple(rank * size if axis == row.ranks else 0 for axis, size in enumerate(part))
        for i, expert in enumerate(experts):
            apart = "{j}" in name
            tensor = name.replace("{j}", str(expert))
            tensors[tensor] = whole if apart else together
            start = before + (0 if apart else i * math.prod(whole))
            pieces.append(Piece(tensor, start, expert, origin, part, row.layout))
    return Group(ours, shape, row.layout, tensors, tuple(pieces), tuple(copies))


def _together(row: Row, each: tuple[int, ...], experts: int) -> tuple[int, ...]:
    """The shape of a tensor that holds all experts."""
    return (experts * each[0], *each[1:]) if row.flat else (experts, *each)
