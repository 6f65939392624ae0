"""What the Hopper kernels share: tiles, matmuls that also run in the interpreter, block rings.

A kernel's threads are warpgroups: some compute, the last one moves memory. Shape letters are those
of each kernel's own legend.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import ptxas
from pallas_kernels.platform import target

WGMMA = plgpu.Layout.WGMMA  # how a warpgroup holds an accumulator
ROWS = WGMMA.reduce(1)  # one value for each of its rows
COLUMNS = WGMMA.reduce(0)  # one value for each of its columns
# The same columns in each thread, and all rows in each warp.
EACH_WARP = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 8), (2,))),
    warp_dims=(plgpu.Replicated(4),),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
SMEM_BYTES = 227 * 1024  # of one block, on Hopper
WARPGROUP = 64  # rows of one wgmma
# No kernel here reads and writes the same shared memory from one thread without a fence, and none
# reduces over a whole warpgroup in the loop.
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
)


def why_not_hopper(interpret: Any = None) -> str | None:
    """Why kernels for Hopper cannot run on the current device or as `interpret` says, or None."""
    if interpret is True:
        return "interpret=True is for TPU kernels; give plgpu.InterpretGPUParams()"
    if interpret:
        return None
    device = target()
    if not device.is_hopper:
        return f"it needs an H100 or H200, and this is {device}"
    if reason := ptxas.why_not():
        warnings.warn(f"Hopper kernels are not used: {reason}.", stacklevel=2)
    return reason


def flat_grid(sizes: tuple[int, ...]) -> dict[str, Any]:
    """A grid of such sizes, as `plgpu.kernel` takes it, with all blocks along CUDA's x.

    Of a grid with several axes, Mosaic GPU maps the last to x, which has room for 2^31 - 1 blocks,
    and the others to y and z, which have 65,535 each.
    """
    return {"grid": (math.prod(sizes),), "grid_names": ("place",)}


def place_in(sizes: tuple[int, ...]) -> list[jax.Array]:
    """Where a block is in its `flat_grid`; blocks start in order, along the last axis first."""
    rest, indices = lax.axis_index("place"), []
    for size in reversed(sizes):
        indices.append(lax.rem(rest, size))
        rest = lax.div(rest, size)
    return indices[::-1]


def tile(*shape: int, dtype=jnp.bfloat16):
    """Shared memory in the layout that TMA writes and wgmma reads."""
    swizzle = plgpu.find_swizzle(shape[-1] * jnp.dtype(dtype).itemsize * 8)
    elements = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(swizzle)),
    )


def along_rows(x: jax.Array, like: jax.Array) -> jax.Array:
    """One value a row, for every column of `like`."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def along_columns(x: jax.Array, like: jax.Array) -> jax.Array:
    """One value a column, for every row of `like`."""
    return lax.broadcast_in_dim(x, like.shape, [1])


def full(shape: tuple[int, ...], value: float, layout) -> jax.Array:
    """A float32 constant in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


class ColumnReduction:
    """Maximum or sum down the rows of an accumulator that one warpgroup holds.

    Rows lie in all four warps, so values pass through shared memory, which is the warpgroup's own.
    JAX would reduce in scratch that has one place in a kernel: two warpgroups that reduce at once
    overwrite each other's values there, and the interpreter does not see it.

    A barrier of the warpgroup must lie between one reduction's result and the next reduction.
    """

    def __init__(self, values: Any):
        self.values = values

    @staticmethod
    def types(warpgroups: int, rows: int, columns: int) -> Any:
        """Scratch of all warpgroups; `values` is one's part."""
        return plgpu.SMEM((warpgroups, rows, columns), jnp.float32)

    def max(self, x: jax.Array) -> jax.Array:
        """The largest value of each column."""
        return self._all_rows(x).max(axis=0)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum of each column."""
        return self._all_rows(x).sum(axis=0)

    def _all_rows(self, x: jax.Array) -> jax.Array:
        """x with all rows in each warp."""
        self.values[...] = x
        plgpu.commit_smem()  # a barrier of the warpgroup
        return plgpu.load(self.values, layout=EACH_WARP, optimized=False)


def half_masks(index: jax.Array) -> tuple[jax.Array, ...]:
    """Masks of a byte's bits for `widen`: its low half; of its high half the value, and the sign.

    They are computed from an index so that ptxas keeps each in a register: it writes a constant
    anew at every use, but does not know that an index is never negative.
    """
    zero = jnp.minimum(index, 0)
    return tuple((zero + bits).astype(jnp.uint16) for bits in (0x0F, 0x70, 0x80))


def widen(ref, masks: tuple[jax.Array, ...] = ()) -> tuple[jax.Array, ...]:
    """Stored values as bfloat16 in registers; with `half_masks`, the low and high halves of bytes.

    A half becomes part of the bits of a bfloat16 number, and subtracting the rest of that number
    leaves its value: cheaper than converting an integer. Bit 0 is worth 1 in numbers from 128 to
    256, as is bit 4 in numbers from 8 to 16.
    """
    values = ref[...]
    if jnp.issubdtype(values.dtype, jnp.floating):  # Hopper has no direct conversion
        return (values.astype(jnp.float32).astype(jnp.bfloat16),)
    if not masks:
        return (values.astype(jnp.bfloat16),)
    bits = lax.bitcast_convert_type(values, jnp.uint8).astype(jnp.uint16)
    low, high, sign = (bits & mask for mask in masks)
    return (
        _bfloat16((low ^ 8) | 0x4300) - 136,  # the half plus 8 is unsigned
        _bfloat16(high | 0x4100) - _bfloat16(sign | 0x4100),  # the sign bit turns 8 into 16
    )


def _bfloat16(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Wgmma:
    """Tensor-core products; `a` may be in registers, `b` is in shared memory.

    The GPU interpreter knows neither register operands nor accumulators that start from a value,
    so there the same sums are plain dots.
    """

    interpret: bool

    def dot(self, a, b, then: Callable[[], None] = lambda: None) -> jax.Array:
        """a @ b in float32; `then` runs once the product is under way."""
        return self.sum([(a, b)], then=then)

    def add(self, acc: jax.Array, a, b, then: Callable[[], None] = lambda: None) -> Any:
        """acc + a @ b; `then` runs while it is under way."""
        return self.sum([(a, b)], acc, then)

    def sum(
        self, products: list, acc: jax.Array | None = None, then: Callable[[], None] = lambda: None
    ) -> Any:
        """a @ b of each pair, and `acc`, in one sum; `then` runs while they are under way."""
        if self.interpret:
            total = sum((self._plain(*pair) for pair in products), 0.0 if acc is None else acc)
            then()
            return total

        def run(ref):
            for pair in products:
                plgpu.wgmma(ref, *pair)
            then()

        def run_from_zero(ref):
            run(ref)
            return ref[...]

        if acc is not None:
            return pl.run_state(run)(plgpu.ACC.init(acc))
        a, b = products[0]
        return pl.run_scoped(run_from_zero, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))

    def add_each(self, accs: tuple, products: list) -> Any:
        """acc + a @ b of each accumulator and its pair; all are under way at once."""
        if self.interpret:
            return tuple(acc + self._plain(*pair) for acc, pair in zip(accs, products, strict=True))

        def run(refs):
            for ref, pair in zip(refs, products, strict=True):
                plgpu.wgmma(ref, *pair)

        return pl.run_state(run)(tuple(plgpu.ACC.init(acc) for acc in accs))

    def dot_and_add(
        self, pair: tuple, use: Callable, acc: Callable, other: tuple, then: Callable[[], None]
    ) -> tuple[Any, jax.Array]:
        """use(a @ b) of one pair, computed while acc() + a @ b of the other is under way; and that.

        acc is computed under the first product; `then` runs once both are under way.
        """
        if self.interpret:
            first = self._plain(*pair)
            total = acc() + self._plain(*other)
            then()
            return use(first), total

        def run(product, total):
            plgpu.wgmma(product, *pair)
            total[...] = acc()
            plgpu.wgmma(total, *other)
            then()
            return use(plgpu.wgmma_accumulator_load(product, wait_n=1)), total[...]

        shapes = ((a.shape[0], b.shape[1]) for a, b in (pair, other))
        return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    def _plain(self, a, b) -> jax.Array:
        product = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # the interpreter would take a later TMA write for a race
        return product


class Ring:
    """Slots of shared memory that one thread fills in turn while others use them.

    Step t is in slot t % slots. Each user opens the ring before its first step, takes and releases
    every step, and the filler drains the ring after its last one: no barrier is left unobserved.
    """

    def __init__(self, buffers: tuple, filled: Any, released: Any):
        self.buffers, self.filled, self.released = buffers, filled, released
        self.slots = buffers[0].shape[0]

    @staticmethod
    def types(buffers: tuple, users: int) -> tuple:
        """Scratch types of a ring; each buffer is [slots, ...]."""
        slots = buffers[0].shape[0]
        filled = plgpu.Barrier(num_arrivals=len(buffers), num_barriers=slots)
        return buffers, filled, plgpu.Barrier(num_arrivals=users, num_barriers=slots)

    def open(self, first: jax.Array | int = 0, stride: int = 1) -> None:
        """A user: the slots that it uses, by default all, may be filled."""
        for slot in range(0, self.slots, stride):
            plgpu.barrier_arrive(self.released.at[slot + first])

    def fill(self, step: jax.Array | int, *sources) -> None:
        """The filler: copies one source into each buffer once the slot is free."""
        slot = lax.rem(step, self.slots)
        plgpu.barrier_wait(self.released.at[slot])
        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.filled.at[slot])

    def wait(self, step: jax.Array | int) -> None:
        """A user: until the step is there; once a step."""
        plgpu.barrier_wait(self.filled.at[lax.rem(step, self.slots)])

    def at(self, step: jax.Array | int):
        """The buffers of a step; one that is alone is not a tuple."""
        slot = lax.rem(step, self.slots)
        taken = tuple(buffer.at[slot] for buffer in self.buffers)
        return taken if len(taken) > 1 else taken[0]

    def take(self, step: jax.Array | int):
        """A user: waits for the step and gives its buffers."""
        self.wait(step)
        return self.at(step)

    def release(self, step: jax.Array | int) -> None:
        """A user: it no longer reads the step."""
        plgpu.barrier_arrive(self.released.at[lax.rem(step, self.slots)])

    def drain(self, steps: jax.Array | int) -> None:
        """The filler: waits until all steps are released."""
        for ahead in range(self.slots):
            plgpu.barrier_wait(self.released.at[lax.rem(steps + ahead, self.slots)])


def accumulate(
    ring: Ring, steps, multiply: Callable, shape: tuple[int, int], count: int, begin=0
) -> list[jax.Array]:
    """Sums of `multiply(buffers, accumulators)` over steps of a ring, float32 of `shape`.

    A step is released when the next one's products are under way, so that they never pause.

    Args:
        count: of accumulators, each of which `multiply` gives one product.
        begin: the ring's step that the first one is.
    """

    def run(*accumulators):
        @pl.loop(0, steps)
        def _(step):
            multiply(ring.take(begin + step), accumulators)
            plgpu.wgmma_wait(count)
            pl.when(step > 0)(lambda: ring.release(begin + step - 1))

        sums = [acc[...] for acc in accumulators]
        pl.when(steps > 0)(lambda: ring.release(begin + steps - 1))
        return sums

    return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32)] * count)
