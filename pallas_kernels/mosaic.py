"""Building blocks of the Hopper kernels: tiles, tensor-core products, rings of shared memory.

The products also run in JAX's GPU interpreter. A kernel's threads are warpgroups of 128: some
compute, and the last one copies from global to shared memory. The shape letters in a kernel's names
are explained in the docstring of its own module.
"""

import dataclasses
import functools
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

WGMMA = plgpu.Layout.WGMMA  # the register layout of an accumulator
ROWS = WGMMA.reduce(1)  # the layout of one value for each row of an accumulator
COLUMNS = WGMMA.reduce(0)  # the layout of one value for each column of an accumulator
# An accumulator of which every warp holds all rows, with the same columns in each thread as WGMMA.
ALL_ROWS_PER_WARP = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 8), (2,))),
    warp_dims=(plgpu.Replicated(4),),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
SMEM_BYTES = 227 * 1024  # shared memory that one block can have on Hopper
WARPGROUP = 64  # rows of one wgmma product
# The compiler's own barriers and reduction scratch are switched off: every kernel here puts a fence
# between writing and reading the same shared memory, and reduces with `ColumnReduction` only.
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
)


def why_not_hopper(interpret: Any = None) -> str | None:
    """Says why kernels for Hopper cannot run; None if they can.

    Args:
        interpret: the parameters of JAX's GPU interpreter, which needs no Hopper; None to run on
            the current device.
    """
    if isinstance(interpret, plgpu.InterpretGPUParams):
        return None
    if interpret:
        return f"{interpret} is for TPU kernels; give plgpu.InterpretGPUParams()"
    device = target()
    if not device.is_hopper:
        return f"it needs an H100 or H200, and this is {device}"
    if reason := ptxas.why_not():
        warnings.warn(f"Hopper kernels are not used: {reason}.", stacklevel=2)
    return reason


def hopper_kernel(body: Callable, *, interpret: Any, **options: Any) -> Callable:
    """`plgpu.kernel` with this module's compiler parameters: one function for equal arguments.

    So a program traces, lowers and compiles a kernel once, in however many layers it is called:
    Mosaic GPU numbers a program's kernels and would compile equal ones once for each number.

    Args:
        body: the kernel, or a `functools.partial` of it with hashable positional arguments.
        interpret: parameters of the GPU interpreter, or None.
        **options: hashable arguments of `plgpu.kernel`.
    """
    flat = functools.partial(body)  # of a function, even if `body` is a partial itself
    if flat.keywords:
        raise ValueError(f"the kernel's own arguments {list(flat.keywords)} must be positional.")
    return _hopper_kernel(flat.func, flat.args, interpret, tuple(options.items()))


@functools.lru_cache(maxsize=1024)
def _hopper_kernel(function, arguments, interpret, options) -> Callable:
    body = functools.partial(function, *arguments)
    options = dict(options)
    shared = {"compiler_params": COMPILER_PARAMS, "interpret": interpret}
    return jax.jit(plgpu.kernel(body, **shared, **options))


def flat_grid(sizes: tuple[int, ...]) -> dict[str, Any]:
    """Keyword arguments of `plgpu.kernel` for a grid of these sizes as one axis, CUDA's x.

    Mosaic GPU would map only the last of several axes to x, which holds 2^31 - 1 blocks, and the
    others to y and z, which hold 65,535 each: too few for ten million keys.
    """
    return {"grid": (math.prod(sizes),), "grid_names": ("block",)}


def grid_indices(sizes: tuple[int, ...]) -> list[jax.Array]:
    """The running block's index along each axis of its `flat_grid`.

    Blocks start in row-major order: neighbors along the last axis start together.
    """
    rest, indices = lax.axis_index("block"), []
    for size in reversed(sizes):
        indices.append(lax.rem(rest, size))
        rest = lax.div(rest, size)
    return indices[::-1]


def tile(*shape: int, dtype=jnp.bfloat16):
    """The type of a shared-memory tile in the swizzled layout that TMA writes and wgmma reads."""
    swizzle = plgpu.find_swizzle(shape[-1] * jnp.dtype(dtype).itemsize * 8)
    elements = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(swizzle)),
    )


def along_rows(x: jax.Array, like: jax.Array) -> jax.Array:
    """Broadcasts a value for each row, [rows], to the shape [rows, columns] of `like`."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def along_columns(x: jax.Array, like: jax.Array) -> jax.Array:
    """Broadcasts a value for each column, [columns], to the shape [rows, columns] of `like`."""
    return lax.broadcast_in_dim(x, like.shape, [1])


def whole_power(top: jax.Array) -> jax.Array:
    """The nearest whole number to a maximum of scores in base 2.

    Probabilities below different such maxima differ by a power of two, so that their roundings to
    bfloat16 do not depend on which keys share a block.
    """
    return lax.round(top, lax.RoundingMethod.TO_NEAREST_EVEN)


def full(shape: tuple[int, ...], value: float, layout) -> jax.Array:
    """A float32 array of one value, in registers of the given layout."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


class ColumnReduction:
    """Maximum or sum over the rows of an accumulator that one warpgroup holds.

    The rows are distributed over four warps, so values pass through shared memory of the
    warpgroup's own. JAX's reductions share one scratch buffer in a kernel: two warpgroups that
    reduce at the same time would overwrite each other's values, which the interpreter does not
    detect.

    The caller puts a warpgroup barrier between the use of one result and the next reduction.
    """

    def __init__(self, values: Any):
        self.values = values

    @staticmethod
    def types(warpgroups: int, rows: int, columns: int) -> Any:
        """The scratch type for all warpgroups; each passes its own slice as `values`."""
        return plgpu.SMEM((warpgroups, rows, columns), jnp.float32)

    def max(self, x: jax.Array) -> jax.Array:
        """The maximum of each column, [columns]."""
        return self._all_rows(x).max(axis=0)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum of each column, [columns]."""
        return self._all_rows(x).sum(axis=0)

    def _all_rows(self, x: jax.Array) -> jax.Array:
        """Copies x so that every warp holds all of its rows."""
        self.values[...] = x
        plgpu.commit_smem()  # also a barrier of the warpgroup
        return plgpu.load(self.values, layout=ALL_ROWS_PER_WARP, optimized=False)


def half_masks(index: jax.Array) -> tuple[jax.Array, ...]:
    """The bit masks that `widen` needs to unpack int4 pairs from bytes.

    Masks are 0x0F for the low element, 0x70 for the value bits of the high element, and 0x80 for
    its sign. They are computed from a runtime index so that ptxas keeps each in a register: it
    would rewrite a constant at every use, but cannot know that an index is never negative.
    """
    zero = jnp.minimum(index, 0)
    return tuple((zero + bits).astype(jnp.uint16) for bits in (0x0F, 0x70, 0x80))


def widen(ref, masks: tuple[jax.Array, ...] = ()) -> tuple[jax.Array, ...]:
    """Loads stored values into registers as bfloat16; two arrays if bytes hold two int4 each.

    An int4 element is put into the mantissa of a bfloat16 number, and subtracting the rest of that
    number leaves the element: cheaper than an integer conversion. The mantissa's bit 0 is worth 1
    in numbers from 128 to 256, and its bit 4 in numbers from 8 to 16.

    Args:
        ref: float8, int8, or int4 packed by `quantized.quantize`.
        masks: `half_masks` for int4, otherwise empty.
    """
    values = ref[...]
    if jnp.issubdtype(values.dtype, jnp.floating):  # Hopper cannot convert float8 to bfloat16
        return (values.astype(jnp.float32).astype(jnp.bfloat16),)
    if not masks:
        return (values.astype(jnp.bfloat16),)
    bits = lax.bitcast_convert_type(values, jnp.uint8).astype(jnp.uint16)
    low, high, sign = (bits & mask for mask in masks)
    return (
        _bfloat16((low ^ 8) | 0x4300) - 136,  # 128 + (element + 8), less 136
        _bfloat16(high | 0x4100) - _bfloat16(sign | 0x4100),  # the sign bit makes 16 of 8
    )


def _bfloat16(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Wgmma:
    """Tensor-core products a @ b, with a in registers or shared memory and b in shared memory.

    The GPU interpreter supports neither register operands nor accumulators with an initial value;
    under it the same sums are computed by `jnp.dot`.

    Products run asynchronously. The callback `then` of a method runs after they were issued and
    before they are awaited, such as to release a buffer or to start a copy.
    """

    interpret: bool

    def dot(self, a, b, then: Callable[[], None] = lambda: None) -> jax.Array:
        """Returns a @ b in float32."""
        return self.sum([(a, b)], then=then)

    def add(self, acc: jax.Array, a, b, then: Callable[[], None] = lambda: None) -> Any:
        """Returns acc + a @ b in float32."""
        return self.sum([(a, b)], acc, then)

    def sum(
        self, products: list, acc: jax.Array | None = None, then: Callable[[], None] = lambda: None
    ) -> Any:
        """Returns the sum of a @ b over all pairs (a, b), plus `acc` if given, in float32."""
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
        """Returns acc + a @ b for each accumulator and its pair (a, b), issued concurrently."""
        if self.interpret:
            return tuple(acc + self._plain(*pair) for acc, pair in zip(accs, products, strict=True))

        def run(refs):
            for ref, pair in zip(refs, products, strict=True):
                plgpu.wgmma(ref, *pair)

        return pl.run_state(run)(tuple(plgpu.ACC.init(acc) for acc in accs))

    def dot_and_add(
        self, pair: tuple, use: Callable, acc: Callable, other: tuple, then: Callable[[], None]
    ) -> tuple[Any, jax.Array]:
        """Overlaps two products: returns use(a @ b) of one pair, and acc() + a @ b of the other.

        `acc` runs while the first product is computed, and `use` while the second one is.

        Args:
            pair: operands (a, b) of the first product.
            use: maps the first product to the first result.
            acc: computes the initial value of the second accumulator.
            other: operands (a, b) of the second product.
            then: runs after both products were issued.
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
        plgpu.commit_smem()  # else the interpreter reports a race with a later TMA write
        return product


class Ring:
    """A circular buffer in shared memory: one producer fills slots while consumers read others.

    The data of step t is in slot t % slots. Each consumer calls `open` before its first step, then
    `take` and `release` for every step. The producer calls `fill` for every step and `drain` after
    its last one, so that no barrier arrival is left unobserved when the kernel ends.
    """

    def __init__(self, buffers: tuple, filled: Any, released: Any):
        self.buffers, self.filled, self.released = buffers, filled, released
        self.slots = buffers[0].shape[0]

    @staticmethod
    def types(buffers: tuple, users: int) -> tuple:
        """The scratch types of a ring.

        Args:
            buffers: types of shared memory, each [slots, ...].
            users: how many consumers release each slot.
        """
        slots = buffers[0].shape[0]
        filled = plgpu.Barrier(num_arrivals=len(buffers), num_barriers=slots)
        return buffers, filled, plgpu.Barrier(num_arrivals=users, num_barriers=slots)

    def open(self, first: jax.Array | int = 0, stride: int = 1) -> None:
        """Called by a consumer: lets the producer fill slots `first`, `first + stride`, ..."""
        for slot in range(0, self.slots, stride):
            plgpu.barrier_arrive(self.released.at[slot + first])

    def fill(self, step: jax.Array | int, *sources) -> None:
        """Called by the producer: waits for a free slot, then copies a source to each buffer."""
        slot = lax.rem(step, self.slots)
        plgpu.barrier_wait(self.released.at[slot])
        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.filled.at[slot])

    def wait(self, step: jax.Array | int) -> None:
        """Called by a consumer, once a step: waits until the step's copies have arrived."""
        plgpu.barrier_wait(self.filled.at[lax.rem(step, self.slots)])

    def at(self, step: jax.Array | int):
        """The buffers of a step's slot: a tuple, or the buffer itself if there is only one."""
        slot = lax.rem(step, self.slots)
        taken = tuple(buffer.at[slot] for buffer in self.buffers)
        return taken if len(taken) > 1 else taken[0]

    def take(self, step: jax.Array | int):
        """Called by a consumer: waits for the step and returns its buffers, as `at` does."""
        self.wait(step)
        return self.at(step)

    def release(self, step: jax.Array | int) -> None:
        """Called by a consumer when it no longer reads the step's buffers."""
        plgpu.barrier_arrive(self.released.at[lax.rem(step, self.slots)])

    def drain(self, steps: jax.Array | int) -> None:
        """Called by the producer: waits until consumers have released all `steps` steps."""
        for ahead in range(self.slots):
            plgpu.barrier_wait(self.released.at[lax.rem(steps + ahead, self.slots)])


def accumulate(
    ring: Ring, steps, multiply: Callable, shape: tuple[int, int], count: int, begin=0
) -> list[jax.Array]:
    """Sums products over the steps of a ring; returns `count` float32 arrays of `shape`.

    A step's buffers are released only after the next step's products were issued, so that the
    tensor cores never pause between steps.

    Args:
        ring: the ring that holds the operands.
        steps: how many steps to sum over.
        multiply: called with a step's buffers and the accumulators; issues one product into each.
        shape: of an accumulator, (rows, columns).
        count: the number of accumulators.
        begin: the ring's step at which the sum starts.
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
