"""Which part of which stored tensor holds which slice of which parameter: `names`, for one model.

A `Group` is one parameter, or two that lie side by side in a tensor, with the tensors that hold
it: one, one per expert, or one per model-parallel rank. Its blocks are contiguous in a file and
small; conversion reads tensors and export writes them block by block.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxmoe.checkpoint.mapping.layout import Layout
from jaxmoe.checkpoint.mapping.names import NOT_PACKED, Packing, Row, has_experts
from jaxmoe.config import Llama4Config
from jaxmoe.model.params import named_specs

BLOCK_BYTES = 2**25  # the most that is read at once, and the size of a file of an array

Shape = tuple[int, ...]


class Format(NamedTuple):
    """How a matrix is quantized.

    Attributes:
        name: "int8", "fp8" or "int4".
        group_size: how many inputs share a scale.
    """

    name: str
    group_size: int


def array_shapes(config: Llama4Config, formats: Mapping[str, Format]) -> dict[str, Shape]:
    """The shape of every array of a checkpoint, by dotted name, in a fixed order.

    A quantized parameter is two arrays: `NAME.qvalue` [..., outputs, inputs] and `NAME.scale`
    [..., groups, outputs]. Two int4 inputs share a byte.

    Args:
        config: of the model.
        formats: the formats of the quantized parameters, by name.
    """
    shapes: dict[str, Shape] = {}
    for name, spec in named_specs(config).items():
        if name not in formats:
            shapes[name] = spec.shape
            continue
        *experts, inputs, outputs = spec.matrix_shape
        kind, group_size = formats[name]
        stored = inputs // 2 if kind == "int4" else inputs
        shapes[f"{name}.qvalue"] = (*experts, outputs, stored)
        shapes[f"{name}.scale"] = (*experts, inputs // group_size, outputs)
    return shapes


def main_dtype(nbytes: Mapping[str, int], stated: Any) -> str:
    """The dtype that a model as a whole counts as: the stated one, else the one with most bytes.

    Args:
        nbytes: how many bytes are stored in each dtype, without quantized matrices.
        stated: what the configuration states; ignored unless something is stored in that dtype.
    """
    is_stored = isinstance(stated, str) and stated in nbytes
    return stated if is_stored else max(nbytes, key=lambda dtype: nbytes[dtype])


class Block(NamedTuple):
    """A contiguous range of a stored tensor, and the slice of the parameters that it holds.

    Attributes:
        tensor: the stored tensor's name.
        start: its first element in the flat tensor.
        count: the number of its elements.
        index: the slice of each parameter of the group.
        shape: of that slice, without the axis of experts.
    """

    tensor: str
    start: int
    count: int
    index: tuple[slice, ...]
    shape: Shape


class Piece(NamedTuple):
    """The contiguous part of a tensor that holds one expert's, or one rank's, part of a group.

    Attributes:
        tensor: the stored tensor's name.
        start: its first element in the flat tensor.
        expert: which expert's matrix it belongs to; None if the parameter has no experts.
        origin: where the part begins in the parameter, without the axis of experts.
    """

    tensor: str
    start: int
    expert: int | None
    origin: Shape


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters of one shape that lie together in the same tensors.

    Attributes:
        params: their names, as `array_shapes` has them.
        shape: of each of them.
        layout: how they lie in the tensors.
        tensors: the shape of each stored tensor, by name.
        pieces: in the order of the tensors, without gaps within one.
        piece_shape: what a piece holds of each parameter, without the axis of experts.
        copies: names of tensors with the same content as the first.
    """

    params: tuple[str, ...]
    shape: Shape
    layout: Layout
    tensors: dict[str, Shape]
    pieces: tuple[Piece, ...]
    piece_shape: Shape
    copies: tuple[str, ...] = ()

    def blocks(
        self, itemsize: int, *, tensor: str | None = None, expert: int | None = None
    ) -> Iterator[Block]:
        """The blocks of the group's tensors in stored order, each of at most `BLOCK_BYTES`.

        Args:
            itemsize: bytes of an element of the parameters' arrays.
            tensor: leaves out all other tensors.
            expert: leaves out all other experts.
        """
        for piece in self.pieces:
            if tensor in (None, piece.tensor) and expert in (None, piece.expert):
                yield from self._blocks_of(piece, itemsize)

    def array_block(self, itemsize: int) -> Shape:
        """The shape of a block in each parameter, the axis of experts included."""
        experts = (1,) if has_experts(self.params[0]) else ()
        return (*experts, *self._block_shape(itemsize))

    def _block_shape(self, itemsize: int) -> Shape:
        """The largest slice that divides a piece and is stored in at most `BLOCK_BYTES`.

        The outer stored axes are cut first, which keeps every block contiguous. Scales that several
        outputs share are few, and one block.
        """
        shape = list(self.piece_shape)
        if self.layout.repeats > 1:
            return self.piece_shape
        for axis in self.layout.axes(len(shape))[:2]:
            rest = self.layout.parts * itemsize * math.prod(shape) // shape[axis]
            shape[axis] = _fitting(shape[axis], max(1, BLOCK_BYTES // rest))
        return tuple(shape)

    def _blocks_of(self, piece: Piece, itemsize: int) -> Iterator[Block]:
        shape = self._block_shape(itemsize)
        count = self.layout.stored_size(shape)
        experts = () if piece.expert is None else (slice(piece.expert, piece.expert + 1),)
        outer = self.layout.axes(len(shape))[:2]
        starts = itertools.product(*(range(0, self.piece_shape[a], shape[a]) for a in outer))
        for i, start in enumerate(starts):
            origin = list(piece.origin)
            for axis, offset in zip(outer, start, strict=True):
                origin[axis] += offset
            index = tuple(slice(o, o + n) for o, n in zip(origin, shape, strict=True))
            yield Block(piece.tensor, piece.start + i * count, count, (*experts, *index), shape)


def _fitting(size: int, room: int) -> int:
    """The largest part of an axis that fits; a half, quarter, ... of it if one does.

    Meshes divide axes by powers of two, so that such parts do not straddle devices.
    """
    half = size
    while half > room and half % 2 == 0:
        half //= 2
    if half <= room:
        return half
    return next(part for part in range(room, 0, -1) if size % part == 0)


def expand(
    rows: Iterable[Row],
    shapes: Mapping[str, Shape],
    *,
    ranks: int | None = None,
    packing: Mapping[str, Packing] | None = None,
) -> list[Group]:
    """The groups of a model, in the order of the rows, layer by layer.

    Args:
        rows: the kinds of tensors that the files hold.
        shapes: of the checkpoint's arrays, as `array_shapes` gives them; rows whose parameters are
            not among them are skipped.
        ranks: how many ranks a model-parallel checkpoint has, whose tensors are named
            `{rank}:{name}`.
        packing: how compressed-tensors stores quantized parameters, where not as `NOT_PACKED`.

    Raises:
        ValueError: if a parameter cannot be divided evenly among the ranks.
    """
    groups = []
    packing = packing or {}
    quantized = (name.removesuffix(".qvalue") for name in shapes if name.endswith(".qvalue"))
    of_quantized = {name: packing.get(name, NOT_PACKED) for name in quantized}
    # Neighbouring rows with the same beginning up to `{n}` are expanded together, layer by layer.
    for _, layer_rows in itertools.groupby(rows, lambda row: row.tensor.partition("{n}")[0:2]):
        layer_rows = list(layer_rows)
        for n in itertools.count():
            layer = [g for row in layer_rows for g in _groups(row, n, shapes, ranks, of_quantized)]
            groups += layer
            if not layer or "{n}" not in layer_rows[0].tensor:
                break
    return groups


def _groups(row: Row, n: int, shapes, ranks: int | None, of_quantized) -> list[Group]:
    """The groups of a row in layer `n`: one, or one per parameter that is stacked in a tensor."""
    names = tuple(name.replace("{n}", str(n)) for name in row.params)
    if row.requires and row.requires.replace("{n}", str(n)) not in shapes:
        return []
    if names[0] in of_quantized:
        rows = row.quantized_rows(of_quantized[names[0]])
        return [group for row in rows for group in _groups(row, n, shapes, ranks, of_quantized)]
    if names[0] not in shapes:
        return []
    stored = row.tensor.replace("{n}", str(n))
    if row.layout.parts > 1:
        return [_group(row, stored, names, shapes[names[0]], ranks)]
    sizes = [row.layout.stored_shape(_piece_shape(row, shapes[name], ranks)) for name in names]
    stacked = (sum(size[0] for size in sizes), *sizes[0][1:])
    start, groups = 0, []
    for name, size in zip(names, sizes, strict=True):
        groups.append(_group(row, stored, (name,), shapes[name], ranks, start, stacked))
        start += math.prod(size)
    return groups


def _piece_shape(row: Row, shape: Shape, ranks: int | None) -> Shape:
    """What one tensor holds of a parameter, or of one expert's matrix if it has experts."""
    piece = list(shape[1:] if has_experts(row.params[0]) else shape)
    if ranks is not None and row.rank_axis is not None:
        if piece[row.rank_axis] % ranks:
            raise ValueError(f"{ranks} ranks cannot share {row.params[0]} {shape} evenly")
        piece[row.rank_axis] //= ranks
    return tuple(piece)


def _group(
    row: Row, stored: str, params, shape, ranks: int | None, start: int = 0, stacked=None
) -> Group:
    """The group of some parameters, with the pieces of every expert and rank.

    Args:
        start: the first element of these parameters in a tensor, or in each expert's part of it.
        stacked: the shape of a tensor, or of each expert's part of it, if it holds other parameters
            too.
    """
    piece_shape = _piece_shape(row, shape, ranks)
    matrix = stacked or row.layout.stored_shape(piece_shape)
    experts = range(shape[0]) if has_experts(params[0]) else (None,)
    one_tensor = matrix if experts[0] is None else _with_experts(row, matrix, len(experts))
    tensors, pieces, copies = {}, [], []
    for rank in range(ranks or 1):
        name = stored if ranks is None else f"{rank}:{stored}"
        if rank and row.rank_axis is None:
            copies.append(name)
            continue
        origin = tuple(
            rank * n if axis == row.rank_axis else 0 for axis, n in enumerate(piece_shape)
        )
        for i, expert in enumerate(experts):
            if "{j}" in name:
                tensor, begin = name.replace("{j}", str(expert)), start
                tensors[tensor] = matrix
            else:
                tensor, begin = name, start + i * math.prod(matrix)
                tensors[tensor] = one_tensor
            pieces.append(Piece(tensor, begin, expert, origin))
    return Group(params, shape, row.layout, tensors, tuple(pieces), piece_shape, tuple(copies))


def _with_experts(row: Row, matrix: Shape, experts: int) -> Shape:
    """The shape of a tensor that holds the matrices of all experts."""
    return (experts * matrix[0], *matrix[1:]) if row.flat else (experts, *matrix)
