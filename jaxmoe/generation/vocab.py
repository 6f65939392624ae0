"""Logits over a sharded vocabulary: maxima, masses and kept tokens, without sorting it.

A device has a `Part` of the vocabulary, and gives the others a few numbers of each row. Which
tokens of a row are kept does not depend on the mesh: probabilities are added as integers, whose sum
does not depend on the order, and of tokens with equal logits the lowest id comes first.

Shape letters: B rows, L tokens of the vocabulary that a device has, V all of them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float, Int, Integer, UInt

from jaxmoe import mesh as meshes
from pallas_kernels.platform import target

DIGIT = 3  # bits of a threshold that a pass over the vocabulary finds, except on CPUs
MASS_BITS = 42  # of a probability's fraction, relative to the largest one
NOWHERE = 2**32 - 1  # a position after all tokens
Weigh = Callable[[Bool[Array, "B n L"]], Float[Array, "B n"]]


class Part(NamedTuple):
    """The tokens of the vocabulary that this device has.

    Attributes:
        axes: the mesh axes over which the vocabulary is sharded.
        size: V; parts of a vocabulary that the mesh does not divide end after it.
        ids: [L], the tokens.
    """

    axes: tuple[str, ...]
    size: int
    ids: Int[Array, "L"]

    @property
    def start(self) -> Int[Array, ""]:
        """The first token."""
        return self.ids[0]

    def total(self, x):
        """Sums over all devices."""
        return lax.psum(x, self.axes) if self.axes else x

    def largest(self, x: Float[Array, "B L"]) -> tuple[Float[Array, "B"], Int[Array, "B"]]:
        """The largest value of each row and the first token that has it."""
        value, token = first_largest(x, self.ids)
        if not self.axes:
            return value, token
        best = lax.pmax(value, self.axes)
        return best, lax.pmin(jnp.where(value == best, token, self.size), self.axes)

    def local_index(self, tokens: Int[Array, "..."]) -> Int[Array, "..."]:
        """Where tokens are in this part; L for those that are not."""
        index, here = tokens - self.start, len(self.ids)
        return jnp.where((index >= 0) & (index < here), index, here)

    def at(self, x: Float[Array, "B L"], tokens: Int[Array, "B"]) -> Float[Array, "B"]:
        """The value of one token of each row; NaN for -1."""
        index = self.local_index(tokens)[:, None]
        value = jnp.take_along_axis(x, index, axis=-1, mode="fill", fill_value=0)[:, 0]
        return jnp.where(tokens < 0, jnp.nan, self.total(value))


def this_part(size: int, here: int) -> Part:
    """The part of V tokens that this device has, where each has `here` of them."""
    axes = meshes.sharded_axes("vocab")
    start = lax.axis_index(axes) * here if axes else 0
    return Part(axes, size, start + jnp.arange(here, dtype=jnp.int32))


def padded_size(size: int) -> int:
    """The smallest multiple of the devices that share the vocabulary, at least V."""
    mesh = meshes.current_mesh()
    return size if mesh is None else meshes.padded_shape((size,), ("vocab",), mesh)[0]


def pad_logits(logits: Float[Array, "B V"]) -> Float[Array, "B padded"]:
    """Logits that the mesh divides: -inf after the vocabulary's end."""
    extra = padded_size(logits.shape[-1]) - logits.shape[-1]
    padded = jnp.pad(logits, ((0, 0), (0, extra)), constant_values=-jnp.inf)
    return meshes.constrain(padded, "batch", "vocab")


def first_largest(
    x: Float[Array, "B L"], ids: Int[Array, "L"]
) -> tuple[Float[Array, "B"], Int[Array, "B"]]:
    """The largest value of each row and the lowest id that has it; two plain reductions."""
    value = x.max(axis=-1)
    return value, jnp.where(x == value[:, None], ids, jnp.iinfo(jnp.int32).max).min(axis=-1)


def specs(logits: Float[Array, "B padded"]) -> tuple:
    """The shardings of padded logits, arrays of rows, and [rows, V]; without a mesh nothing."""
    mesh = meshes.current_mesh()
    if mesh is None:
        return None, None, None
    axes = ("batch", "vocab"), ("batch", None), (None, "vocab")
    return tuple(meshes.activation_spec(mesh, each, logits.shape) for each in axes)


def largest_few(
    part: Part, x: Float[Array, "B L"], n: int
) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
    """The n largest values of each row and their tokens, the lower id first of equal values."""
    values, tokens = _largest_here(x, part.ids, n)
    if not part.axes:
        return values, tokens
    # Gathered in the order of ids, in which `top_k` leaves equal values.
    values, tokens = (lax.all_gather(x, part.axes, axis=1, tiled=True) for x in (values, tokens))
    values, order = lax.top_k(values, n)
    return values, jnp.take_along_axis(tokens, order, axis=1)


def _largest_here(x: Float[Array, "B L"], ids: Int[Array, "L"], n: int):
    """The n largest of this device's numbers and their tokens: each pass finds the next."""

    def find(i, found):
        values, tokens = found
        value, token = values[:, i - 1, None], tokens[:, i - 1, None]
        after = (i == 0) | (x < value) | ((x == value) & (ids > token))
        best, first = first_largest(jnp.where(after, x, -jnp.inf), ids)
        return values.at[:, i].set(best), tokens.at[:, i].set(first)

    nothing = jnp.zeros((len(x), n), x.dtype), jnp.zeros((len(x), n), jnp.int32)
    return lax.fori_loop(0, n, find, nothing) if n else nothing


def is_finite(part: Part, logits: Float[Array, "B L"]) -> Bool[Array, "B"]:
    """Whether all logits of a row are finite."""
    broken = ~jnp.isfinite(logits) & (part.ids < part.size)
    return part.total(broken.any(axis=-1).astype(jnp.int32)) == 0


def number(part: Part, masks: Bool[Array, "B n L"]) -> Float[Array, "B n"]:
    """How many tokens each mask has; float32 counts exactly to 2**24."""
    return part.total(masks.sum(axis=-1, dtype=jnp.int32)).astype(jnp.float32)


def mass(
    part: Part, weights: Float[Array, "B L"], masks: Bool[Array, "B n #L"]
) -> Float[Array, "B n"]:
    """The sum of each mask's weights, which are at most 1; the same on every mesh.

    A weight is cut to `MASS_BITS` bits after the point and divided into digits, so small that 32
    bits hold the sum of a digit over the vocabulary.
    """
    bits = 32 - part.size.bit_length()
    sums = []
    for _ in range(math.ceil(MASS_BITS / bits)):
        weights = weights * 2.0**bits
        whole = jnp.floor(weights)
        weights -= whole
        digit = whole.astype(jnp.uint32)[:, None]
        sums.append(jnp.where(masks, digit, 0).sum(axis=-1, dtype=jnp.uint32))
    return _from_digits(part.total(jnp.stack(sums)), bits)


def total_mass(part: Part, weights: Float[Array, "B L"]) -> Float[Array, "B"]:
    """The sum of all weights of a row, as by `mass`."""
    return mass(part, weights, jnp.ones((len(weights), 1, 1), bool))[:, 0]


def _from_digits(sums: UInt[Array, "digits B n"], bits: int) -> Float[Array, "B n"]:
    """The numbers with these digits after the point, most significant first, before carries."""
    value, carry = jnp.float32(0), jnp.uint32(0)
    for i in reversed(range(len(sums))):
        digit = sums[i] + carry
        carry = digit >> bits if i else jnp.uint32(0)
        value += (digit - (carry << bits)).astype(jnp.float32) * 2.0 ** (-bits * (i + 1))
    return jnp.asarray(value)


def kept(
    part: Part, values: Float[Array, "B L"], weigh: Weigh, limit: Float[Array, "B"]
) -> Bool[Array, "B L"]:
    """The tokens that stay if a row takes the largest values until they weigh more than a limit.

    A token stays if the ones before it weigh at most the limit. Before it are those of larger
    values, and those of equal ones and lower ids.

    Args:
        values: at most 0, or -inf.
        weigh: the weights of masks of tokens, `number` or `mass`, on all devices.
    """
    # The bits of floats that are not negative are in the order of the floats.
    distance = lax.bitcast_convert_type(jnp.abs(values), jnp.uint32)
    last = _last_position(distance, weigh, limit, 31)[:, None]
    after = jnp.where(distance == last, part.ids.astype(jnp.uint32) + 1, jnp.uint32(NOWHERE))
    position = jnp.where(distance < last, 0, after)
    return position <= _last_position(position, weigh, limit, part.size.bit_length())[:, None]


def _last_position(
    position: UInt[Array, "B L"], weigh: Weigh, limit: Float[Array, "B"], bits: int
) -> UInt[Array, "B"]:
    """The largest number before which tokens weigh at most the limit.

    Each pass over the vocabulary finds a digit of it. How many there are is known to the compiler,
    so that a GPU's host need not wait for any.

    Args:
        bits: of positions, at most 31. The result may have more, where the limit is never reached.
    """
    # A CPU's time is that of the comparisons, an accelerator's that of starting passes.
    digit = 1 if target().platform == "cpu" else DIGIT

    def narrow(i, found):
        # The last digits may overlap: what is known of them already does not fit again.
        unit = jnp.uint32(1) << jnp.maximum(bits - digit * (i + 1), 0).astype(jnp.uint32)
        tried = found[:, None] + unit * jnp.arange(1, 2**digit, dtype=jnp.uint32)
        fits = weigh(position[:, None] < tried[:, :, None]) <= limit[:, None]
        return found + unit * fits.sum(axis=1, dtype=jnp.uint32)

    return lax.fori_loop(0, math.ceil(bits / digit), narrow, jnp.zeros(len(position), jnp.uint32))


def gumbel(
    part: Part,
    seed: Integer[Array, "B"],
    request: UInt[Array, "B"],
    index: Int[Array, "B"],
) -> Float[Array, "B L"]:
    """Standard Gumbel noise: a function of a row's three numbers and the token's id alone.

    A row's noise is that of `jax.random.categorical` with the seed's key, into which the other two
    are folded; there is no way to ask `jax.random` for a part of it.
    """
    keys = jax.vmap(_key)(seed, request, index)
    ids = jnp.broadcast_to(part.ids.astype(jnp.uint32), (len(keys), len(part.ids)))
    words = threefry2x32_p.bind(keys[:, :1], keys[:, 1:], jnp.zeros_like(ids), ids)
    bits = words[0] ^ words[1]
    ones = lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32)  # 1 to 2
    uniform = jnp.maximum(ones - 1, jnp.finfo(jnp.float32).tiny)
    return -jnp.log(-jnp.log(uniform))


def _key(seed, request, index) -> UInt[Array, "2"]:
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, request), index))
