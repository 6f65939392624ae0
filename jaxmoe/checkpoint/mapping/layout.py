"""How parameters lie in one stored tensor, and how blocks go from one form to the other."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one or several parameters of one shape lie in a stored tensor.

    Shapes and axes are those of the parameter, of one expert where it has experts.

    Attributes:
        in_axes: for the weight of a Linear, stored as [outputs, inputs]: how many leading axes of
            the parameter are inputs. 0: the stored tensor has the parameter's axes in their order.
        parts: how many parameters lie side by side on the last stored axis.
        packed: whether eight 4-bit values share an int32, lowest bits first, each stored as its
            value + 8.
        repeats: how many outputs share one stored row of scales; the last row may have fewer.
    """

    in_axes: int = 0
    parts: int = 1
    packed: bool = False
    repeats: int = 1

    def axes(self, ndim: int) -> tuple[int, ...]:
        """The parameter's axes in stored order, outermost first: outputs before inputs."""
        return (*range(self.in_axes, ndim), *range(self.in_axes))

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the stored matrix or vector that holds parameters of `shape`."""
        if self.in_axes:
            outputs = math.prod(shape[self.in_axes :])
            return -(-outputs // self.repeats), math.prod(shape[: self.in_axes])
        last = shape[-1] // 4 if self.packed else self.parts * shape[-1]
        return (*shape[:-1], last)

    def stored_size(self, shape: tuple[int, ...]) -> int:
        """The number of stored elements that hold parameters of `shape`."""
        return math.prod(self.stored_shape(shape))

    def split(
        self, stored: np.ndarray, shape: tuple[int, ...], group_size: int = 0
    ) -> list[np.ndarray]:
        """The blocks of the parameters in a stored block; views of it where possible.

        Args:
            stored: the flat stored block.
            shape: of each parameter's block.
            group_size: for packed values, how many inputs share a scale.
        """
        if self.packed:
            return [_repacked(stored.view(np.uint8).reshape(shape), group_size)]
        axes = self.axes(len(shape))
        if self.repeats > 1:
            rows = stored.reshape(self.stored_shape(shape))
            stored = np.repeat(rows, self.repeats, axis=0)[: shape[-1]]
        stored = stored.reshape(*(shape[axis] for axis in axes[:-1]), -1)
        return [part.transpose(np.argsort(axes)) for part in np.split(stored, self.parts, axis=-1)]

    def join(self, blocks: list[np.ndarray]) -> np.ndarray:
        """The stored block of some blocks of parameters: the inverse of `split`."""
        assert not self.packed and self.repeats == 1
        axes = self.axes(blocks[0].ndim)
        return np.concatenate([block.transpose(axes) for block in blocks], axis=-1)


def _repacked(stored: np.ndarray, group_size: int) -> np.ndarray:
    """4-bit values as `pallas_kernels.quantized` packs them.

    There a byte holds value i of a group's first half and value i of its second half, both signed.

    Args:
        stored: [outputs, inputs / 2] uint8: values 2i and 2i + 1 in a byte, each with 8 added.
        group_size: how many inputs share a scale.
    """
    values = np.stack([stored & 15, stored >> 4], axis=-1).astype(np.int8) - 8
    groups = values.reshape(stored.shape[0], -1, group_size)
    half = group_size // 2
    packed = (groups[..., :half] & 15) | (groups[..., half:] << 4)
    return packed.reshape(stored.shape).astype(np.int8)
