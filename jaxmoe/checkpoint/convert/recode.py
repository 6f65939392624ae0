"""Jobs of a conversion: each makes a few arrays of a checkpoint from the tensors of a source.

A job yields blocks, in memory bounded by a block or, where it quantizes, by one matrix. The same
blocks are written by a conversion and compared by its verification.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.convert.source import Source
from jaxmoe.checkpoint.mapping.tensors import Format, Group, split
from jaxmoe.errors import UserError
from jaxmoe.model.params import ParamSpec
from pallas_kernels.quantized import (
    QuantizedMatrix,
    default_group_size,
    dequantize_matrix,
    quantize_matrix,
)

COLUMN_BYTES = 2**22  # of float32 numbers that are quantized at once
FLOATS = {"bf16": jnp.bfloat16, "float32": jnp.float32}  # what --weights may widen to
WEIGHTS = ("fp8", "int8", "int4", *FLOATS)


class Array(NamedTuple):
    """An array to be made: what `Writer.create` needs."""

    shape: tuple[int, ...]
    dtype: np.dtype
    block: tuple[int, ...]


class Step(NamedTuple):
    """Blocks that belong together, and how many bytes of the source they took."""

    blocks: list[tuple[str, tuple[slice, ...], np.ndarray]]
    nbytes: int
    error: "Error | None" = None


@dataclasses.dataclass(frozen=True)
class Job:
    """Makes `arrays` out of `nbytes` of tensors; `steps` may be gone through again."""

    arrays: dict[str, Array]
    nbytes: int
    steps: Callable[[], Iterator[Step]]

    @property
    def name(self) -> str:
        """What tells it from other jobs."""
        return next(iter(self.arrays))


class Error(NamedTuple):
    """Of quantized numbers: how many, the sum of their squares and of those of what was lost."""

    count: int
    total: float
    lost: float

    def plus(self, other: "Error") -> "Error":
        """Of both together."""
        return Error(self.count + other.count, self.total + other.total, self.lost + other.lost)


def target_formats(source: Source, weights: str | None) -> dict[str, Format]:
    """How each quantized parameter is to be stored; what has the format already keeps its scales.

    Raises:
        UserError: if a matrix cannot be stored so.
    """
    if weights is None:
        return source.formats
    if weights in FLOATS:
        return {}
    formats = {}
    for name, spec in source.specs.items():
        if not spec.quantizable:
            continue
        held, inputs = source.formats.get(name), spec.matrix_shape[-2]
        if weights == "int4" and inputs % 2:
            raise UserError(f"{name} has {inputs} inputs, which int4 cannot pair; use int8.")
        if held is None or held.name != weights:
            held = Format(weights, default_group_size(weights, inputs))
        formats[name] = held
    return formats


def plan(source: Source, formats: Mapping[str, Format], weights: str | None) -> list[Job]:
    """The jobs that make every array, in the order of the source's groups.

    Args:
        formats: of the result.
        weights: what the user asked for, which says to what other formats are widened.
    """
    jobs, seen = [], set()
    for group in source.groups:
        names = tuple(name.removesuffix(".qvalue").removesuffix(".scale") for name in group.ours)
        if all(formats.get(name) == source.formats.get(name) for name in names):
            jobs.append(_copy(source, group))
        elif names not in seen:
            seen.add(names)
            jobs.append(_recode(source, names, formats, weights))
    return jobs


def _copy(source: Source, group: Group) -> Job:
    """Every byte as it is."""
    stored = source.dtype(group)
    dtype = np.dtype(np.int8) if group.layout.packed else stored
    block = group.block_shape(dtype.itemsize)
    arrays = {name: Array(group.shape, dtype, block) for name in group.ours}
    width = _width(source, group)

    def steps():
        for piece in group.pieces:
            for index, shape, data in _read(source, piece, dtype.itemsize):
                parts = split(piece.layout, data, shape, width)
                placed = [
                    (name, index, part.reshape([s.stop - s.start for s in index]))
                    for name, part in zip(group.ours, parts, strict=True)
                ]
                yield Step(placed, sum(part.nbytes for part in parts))
        source.files.confirm()

    return Job(arrays, _nbytes(group, dtype), steps)


def _width(source: Source, group: Group) -> int:
    """How many packed values share a scale; 0 where none are packed."""
    name = group.ours[0].removesuffix(".qvalue")
    return source.formats[name].width if group.layout.packed else 0


def _nbytes(group: Group, dtype: np.dtype) -> int:
    return len(group.ours) * math.prod(group.shape) * dtype.itemsize


def _read(source: Source, piece, itemsize: int):
    for block in piece.blocks(itemsize):
        yield block.index, block.shape, source.read(piece.tensor, block.start, block.count)


def _recode(source: Source, names, formats: Mapping[str, Format], weights: str | None) -> Job:
    """Matrices in another format than the source's, one expert after the other."""
    groups = _groups_of(source, names)
    spec = source.specs[names[0]]
    arrays: dict[str, Array] = {}
    for name in names:
        arrays |= _arrays(source, name, formats.get(name), weights)
    nbytes = sum(_nbytes(group, source.dtype(group)) for group in groups)
    experts = [None] if len(spec.matrix_shape) == 2 else range(spec.matrix_shape[0])

    def steps():
        parts = itertools.count(1)
        for expert in experts:
            matrices = _matrices(source, groups, names, expert)
            for name, matrix in zip(names, matrices, strict=True):
                encoded, error = _encode(spec, matrix, formats.get(name), weights)
                blocks = [(f"{name}{end}", *_at(expert, x)) for end, x in encoded.items()]
                n, total = next(parts), len(experts) * len(names)
                yield Step(blocks, nbytes * n // total - nbytes * (n - 1) // total, error)
        source.files.confirm()

    return Job(arrays, nbytes, steps)


def _groups_of(source: Source, names) -> list[Group]:
    wanted = {f"{name}{end}" for name in names for end in ("", ".qvalue", ".scale")}
    return [group for group in source.groups if wanted.intersection(group.ours)]


def _arrays(source: Source, name: str, format: Format | None, weights: str | None):
    """What a parameter becomes: one array, or two of a quantized matrix."""
    spec = source.specs[name]
    if format is None:
        assert weights is not None
        experts = (1,) if len(spec.matrix_shape) == 3 else ()
        block = (*experts, *spec.shape[len(experts) :])
        return {name: Array(spec.shape, np.dtype(FLOATS[weights]), block)}
    matrix = jax.ShapeDtypeStruct(spec.matrix_shape, jnp.float32)
    stored = jax.eval_shape(lambda w: quantize_matrix(w, *format), matrix)
    ends = {".qvalue": stored.qvalue, ".scale": stored.scale}
    return {
        f"{name}{end}": Array(x.shape, np.dtype(x.dtype), (*[1] * (x.ndim - 2), *x.shape[-2:]))
        for end, x in ends.items()
    }


def _at(expert: int | None, x: np.ndarray) -> tuple[tuple[slice, ...], np.ndarray]:
    """Where one expert's part of an array goes, and the part with that axis."""
    if expert is None:
        return (slice(None),) * x.ndim, x
    return (slice(expert, expert + 1), *(slice(None),) * x.ndim), x[None]


def _matrices(source: Source, groups: list[Group], names, expert: int | None) -> list[np.ndarray]:
    """The matrices [in, out] of some parameters, of one expert."""
    found: dict[str, np.ndarray] = {}
    for group in groups:
        found |= _gather(source, group, expert)
    matrices = []
    for name in names:
        if name in source.formats:
            stored = found[f"{name}.qvalue"], found[f"{name}.scale"]
            matrices.append(decode(*stored, source.formats[name].name))
        else:
            matrices.append(found[name].reshape(source.specs[name].matrix_shape[-2:]))
    return matrices


def decode(qvalue: np.ndarray, scale: np.ndarray, format: str) -> np.ndarray:
    """The float32 matrix [in, out] of a quantized one."""
    stored = QuantizedMatrix(jnp.asarray(qvalue), jnp.asarray(scale, jnp.float32), format)
    return np.asarray(_dequantize(stored))


_dequantize = jax.jit(dequantize_matrix)


def _gather(source: Source, group: Group, expert: int | None) -> dict[str, np.ndarray]:
    """A group's arrays of one expert, put together from all tensors that hold a part."""
    dtype = np.dtype(np.int8) if group.layout.packed else source.dtype(group)
    lead = 0 if expert is None else 1
    whole = {name: np.empty(group.shape[lead:], dtype) for name in group.ours}
    for piece in group.pieces:
        if piece.expert != expert:
            continue
        for index, shape, data in _read(source, piece, dtype.itemsize):
            parts = split(piece.layout, data, shape, _width(source, group))
            for array, part in zip(whole.values(), parts, strict=True):
                array[index[lead:]] = part
    return whole


def _encode(spec: ParamSpec, matrix, format: Format | None, weights: str | None):
    """What is stored of a matrix, by the end of the array's name, and what that loses."""
    if format is None:
        assert weights is not None
        shape = spec.shape[len(spec.matrix_shape) - 2 :]
        return {"": np.asarray(matrix).astype(FLOATS[weights]).reshape(shape)}, None
    qvalues, scales, error = [], [], Error(0, 0.0, 0.0)
    for columns in _columns(matrix):
        stored, total, lost = _quantize(format, columns)
        qvalues.append(np.asarray(stored.qvalue))
        scales.append(np.asarray(stored.scale))
        error = error.plus(Error(columns.size, float(total), float(lost)))
    return {".qvalue": np.concatenate(qvalues), ".scale": np.concatenate(scales, axis=1)}, error


def _columns(matrix: np.ndarray) -> Iterator[np.ndarray]:
    """Equal shares of the outputs, each small enough to be quantized in the processor's cache."""
    inputs, outputs = matrix.shape
    room = max(1, COLUMN_BYTES // (4 * inputs))
    width = next(n for n in range(min(room, outputs), 0, -1) if outputs % n == 0)
    for start in range(0, outputs, width):
        yield matrix[:, start : start + width]


@functools.partial(jax.jit, static_argnums=0)
def _quantize(format: Format, matrix):
    matrix = matrix.astype(jnp.float32)
    stored = quantize_matrix(matrix, *format)
    lost = jnp.sum(jnp.square(dequantize_matrix(stored) - matrix))
    return stored, jnp.sum(jnp.square(matrix)), lost
