"""The jobs of a conversion: each makes a few of the checkpoint's arrays from a source's tensors.

A job yields blocks of its arrays, and holds one block or, where it quantizes, one matrix in memory.
`conversion` writes the blocks and `verification` compares them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.convert.source import Source
from jaxmoe.checkpoint.mapping.tensors import Format, Group
from jaxmoe.errors import UserError
from jaxmoe.model.params import ParamSpec
from pallas_kernels.quantized import (
    QuantizedMatrix,
    default_group_size,
    dequantize_matrix,
    quantize_matrix,
)

COLUMN_BYTES = 2**22  # float32 numbers that are quantized at once
FLOATS = {"bf16": jnp.bfloat16, "float32": jnp.float32}  # what --weights may widen to
WEIGHTS = ("fp8", "int8", "int4", *FLOATS)

Index = tuple[slice, ...]


class ArraySpec(NamedTuple):
    """An array to be made: the arguments of `Writer.create` after the name.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        block: the shape of the blocks that it is written in.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    block: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The array's size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SquaredError(NamedTuple):
    """What quantizing some numbers lost.

    Attributes:
        count: how many numbers there are.
        total: the sum of their squares.
        lost: the sum of the squares of the differences.
    """

    count: int
    total: float
    lost: float

    def plus(self, other: "SquaredError") -> "SquaredError":
        """The error of these numbers and the other's together."""
        return SquaredError(
            self.count + other.count, self.total + other.total, self.lost + other.lost
        )


class Step(NamedTuple):
    """Blocks that are ready to be written.

    Attributes:
        blocks: of each the array's name, the slice of the array, and the numbers.
        nbytes: how many bytes of the source were read for them.
        error: what quantizing them lost; None if they were not quantized.
    """

    blocks: list[tuple[str, Index, np.ndarray]]
    nbytes: int
    error: SquaredError | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """Makes some of the arrays of a checkpoint.

    Attributes:
        arrays: the arrays, by name.
        nbytes: how many bytes of the source are read.
        steps: reads and yields all blocks; may be called again.
    """

    arrays: dict[str, ArraySpec]
    nbytes: int
    steps: Callable[[], Iterator[Step]]

    @property
    def name(self) -> str:
        """The first array's name, which no other job has."""
        return next(iter(self.arrays))


def target_formats(source: Source, weights: str | None) -> dict[str, Format]:
    """The format in which each quantized parameter is to be stored, by name.

    Args:
        source: the checkpoint; matrices that have the format already keep its scales.
        weights: one of `WEIGHTS`; None keeps the source's formats.

    Raises:
        UserError: if a matrix cannot be stored in the format.
    """
    if weights is None:
        return source.formats
    if weights in FLOATS:
        return {}
    formats = {}
    for name, spec in source.specs.items():
        if not spec.quantizable:
            continue
        format, inputs = source.formats.get(name), spec.matrix_shape[-2]
        if weights == "int4" and inputs % 2:
            raise UserError(f"{name} has {inputs} inputs, which int4 cannot pair; use int8.")
        if format is None or format.name != weights:
            format = Format(weights, default_group_size(weights, inputs))
        formats[name] = format
    return formats


def plan(source: Source, formats: Mapping[str, Format], weights: str | None) -> list[Job]:
    """The jobs that make every array, in the order of the source's groups.

    Args:
        source: the checkpoint that is read.
        formats: the formats of the result, as `target_formats` gives them.
        weights: as for `target_formats`; the dtype of what is widened.
    """
    jobs, recoded = [], set()  # a quantized matrix is two groups of the source, and one job
    for group in source.groups:
        names = tuple(name.removesuffix(".qvalue").removesuffix(".scale") for name in group.params)
        if all(formats.get(name) == source.formats.get(name) for name in names):
            jobs.append(_copy(source, group))
        elif names not in recoded:
            recoded.add(names)
            jobs.append(_recode(source, names, formats, weights))
    return jobs


def _copy(source: Source, group: Group) -> Job:
    """The job that keeps every byte of a group."""
    dtype = _array_dtype(source, group)
    block_shape = group.array_block(dtype.itemsize)
    arrays = {name: ArraySpec(group.shape, dtype, block_shape) for name in group.params}

    def steps():
        for block in group.blocks(dtype.itemsize):
            parts = source.read_block(group, block)
            placed = [
                (name, block.index, part.reshape([s.stop - s.start for s in block.index]))
                for name, part in zip(group.params, parts, strict=True)
            ]
            yield Step(placed, sum(part.nbytes for part in parts))
        source.files.confirm()

    return Job(arrays, _nbytes(source, group), steps)


def _array_dtype(source: Source, group: Group) -> np.dtype:
    """The dtype of a group's arrays: the stored one, or int8 for packed words."""
    return np.dtype(np.int8) if group.layout.packed else source.dtype(group)


def _nbytes(source: Source, group: Group) -> int:
    """The bytes of a group's arrays."""
    return len(group.params) * math.prod(group.shape) * _array_dtype(source, group).itemsize


def _recode(
    source: Source,
    names: tuple[str, ...],
    formats: Mapping[str, Format],
    weights: str | None,
) -> Job:
    """The job that quantizes or widens parameters that share tensors, expert by expert."""
    groups = _groups_of(source, names)
    spec = source.specs[names[0]]
    arrays: dict[str, ArraySpec] = {}
    for name in names:
        arrays |= _arrays(source.specs[name], name, formats.get(name), weights)
    nbytes = sum(_nbytes(source, group) for group in groups)
    experts = [None] if len(spec.matrix_shape) == 2 else range(spec.matrix_shape[0])

    def steps():
        n, total = 0, len(experts) * len(names)
        for expert in experts:
            matrices = _matrices(source, groups, names, expert)
            for name, matrix in zip(names, matrices, strict=True):
                parts, error = _encode(spec, matrix, formats.get(name), weights)
                blocks = [(f"{name}{end}", *_placed(expert, x)) for end, x in parts.items()]
                n += 1
                yield Step(blocks, nbytes * n // total - nbytes * (n - 1) // total, error)
        source.files.confirm()

    return Job(arrays, nbytes, steps)


def _groups_of(source: Source, names: tuple[str, ...]) -> list[Group]:
    """The groups that hold some parameters, quantized or not."""
    wanted = {f"{name}{end}" for name in names for end in ("", ".qvalue", ".scale")}
    return [group for group in source.groups if wanted.intersection(group.params)]


def _arrays(
    spec: ParamSpec, name: str, format: Format | None, weights: str | None
) -> dict[str, ArraySpec]:
    """The arrays of a parameter: one, or two if it is to be quantized."""
    if format is None:
        assert weights is not None
        experts = (1,) if len(spec.matrix_shape) == 3 else ()
        block = (*experts, *spec.shape[len(experts) :])
        return {name: ArraySpec(spec.shape, np.dtype(FLOATS[weights]), block)}
    matrix = jax.ShapeDtypeStruct(spec.matrix_shape, jnp.float32)
    stored = jax.eval_shape(lambda w: quantize_matrix(w, *format), matrix)
    ends = {".qvalue": stored.qvalue, ".scale": stored.scale}
    return {
        f"{name}{end}": ArraySpec(x.shape, np.dtype(x.dtype), (*[1] * (x.ndim - 2), *x.shape[-2:]))
        for end, x in ends.items()
    }


def _placed(expert: int | None, x: np.ndarray) -> tuple[Index, np.ndarray]:
    """The slice of an array that holds one expert, or all of it, and what belongs there."""
    if expert is None:
        return (slice(None),) * x.ndim, x
    return (slice(expert, expert + 1), *(slice(None),) * x.ndim), x[None]


def _matrices(
    source: Source, groups: list[Group], names: tuple[str, ...], expert: int | None
) -> list[np.ndarray]:
    """The matrices [inputs, outputs] of some parameters, or of one expert of them."""
    arrays: dict[str, np.ndarray] = {}
    for group in groups:
        arrays |= _gather(source, group, expert)
    matrices = []
    for name in names:
        if name in source.formats:
            stored = arrays[f"{name}.qvalue"], arrays[f"{name}.scale"]
            matrices.append(decode(*stored, source.formats[name].name))
        else:
            matrices.append(arrays[name].reshape(source.specs[name].matrix_shape[-2:]))
    return matrices


def decode(qvalue: np.ndarray, scale: np.ndarray, format: str) -> np.ndarray:
    """The float32 matrix [inputs, outputs] of a quantized one.

    Args:
        qvalue: [outputs, inputs], or half as many bytes of int4 pairs.
        scale: [groups of inputs, outputs].
        format: "int8", "fp8" or "int4".
    """
    stored = QuantizedMatrix(jnp.asarray(qvalue), jnp.asarray(scale, jnp.float32), format)
    return np.asarray(_dequantize(stored))


_dequantize = jax.jit(dequantize_matrix)


def _gather(source: Source, group: Group, expert: int | None) -> dict[str, np.ndarray]:
    """A group's arrays by name, or one expert's part of them, read from all its tensors."""
    dtype = _array_dtype(source, group)
    leading = 0 if expert is None else 1
    arrays = {name: np.empty(group.shape[leading:], dtype) for name in group.params}
    for block in group.blocks(dtype.itemsize, expert=expert):
        for array, part in zip(arrays.values(), source.read_block(group, block), strict=True):
            array[block.index[leading:]] = part
    return arrays


def _encode(
    spec: ParamSpec, matrix: np.ndarray, format: Format | None, weights: str | None
) -> tuple[dict[str, np.ndarray], SquaredError | None]:
    """What is stored of a matrix, by the end of the array's name, and what quantizing it lost."""
    if format is None:
        assert weights is not None
        shape = spec.shape[len(spec.matrix_shape) - 2 :]
        return {"": np.asarray(matrix).astype(FLOATS[weights]).reshape(shape)}, None
    qvalues, scales, error = [], [], SquaredError(0, 0.0, 0.0)
    for columns in _columns(matrix):
        stored, total, lost = _quantize(format, columns)
        qvalues.append(np.asarray(stored.qvalue))
        scales.append(np.asarray(stored.scale))
        error = error.plus(SquaredError(columns.size, float(total), float(lost)))
    return {".qvalue": np.concatenate(qvalues), ".scale": np.concatenate(scales, axis=1)}, error


def _columns(matrix: np.ndarray) -> Iterator[np.ndarray]:
    """Equal shares of the outputs of [inputs, outputs], each at most `COLUMN_BYTES` in float32.

    A share stays in the processor's cache while it is quantized.
    """
    inputs, outputs = matrix.shape
    room = max(1, COLUMN_BYTES // (4 * inputs))
    width = next(n for n in range(min(room, outputs), 0, -1) if outputs % n == 0)
    for start in range(0, outputs, width):
        yield matrix[:, start : start + width]


@functools.partial(jax.jit, static_argnums=0)
def _quantize(format: Format, matrix):
    """The quantized matrix, the sum of its squares, and that of the squared differences."""
    matrix = matrix.astype(jnp.float32)
    stored = quantize_matrix(matrix, *format)
    lost = jnp.sum(jnp.square(dequantize_matrix(stored) - matrix))
    return stored, jnp.sum(jnp.square(matrix)), lost
