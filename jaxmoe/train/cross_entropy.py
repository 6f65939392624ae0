"""Cross entropy of tokens, without the logits of the whole vocabulary at once.

The vocabulary goes by in chunks, each of which multiplies all tokens of a device. The forward pass
keeps a running maximum and sum of each token; the backward pass makes each chunk's logits again,
adds to the gradient of the hidden states, and finishes the chunk's part of the head's gradient.
Chunks of tokens would read the head, and add to all of its gradient, once for each chunk.

Shape letters: B rows, S tokens a row, T tokens of a device, D embed, V vocabulary, C vocabulary of
a chunk.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxmoe import mesh as meshes
from jaxmoe.config import Llama4Config

CHUNK_BYTES = 2**27  # of a chunk's float32 logits, and of its gradient of the head, on a device
LEAST_CHUNK = 2048  # of the vocabulary: thinner products are bound by memory
ALIGNED = 128
LOWEST = float(jnp.finfo(jnp.float32).min)  # a logit that is no logit: its exponential is 0


class TokenLosses(NamedTuple):
    """What the model says of each place's target, in float32."""

    nats: Float[Array, "B S"]  # the cross entropy: minus the target's log-probability
    log_sum_exp: Float[Array, "B S"]  # of the place's logits
    right: Bool[Array, "B S"]  # no token is likelier than the target


@dataclasses.dataclass(frozen=True)
class _Head:
    """The matrix that makes logits: `lm_head` [D, V], or the embeddings [V, D] where tied."""

    vocab_size: int
    tied: bool

    @property
    def axes(self) -> tuple[str, str]:
        return ("vocab", "embed") if self.tied else ("embed", "vocab")

    @property
    def letters(self) -> str:
        return "CD" if self.tied else "DC"

    def axis(self, name: str) -> int:
        return self.axes.index(name)


def token_losses(
    config: Llama4Config,
    params: dict,
    hidden: Float[Array, "B S D"],
    targets: Int[Array, "B S"],
) -> TokenLosses:
    """The cross entropy of one target for each place, and what else losses are made of.

    Logits are never rounded to the dtype of `hidden`, as `unembed` rounds them. A head that is not
    trained costs no gradient, neither time nor memory. The gradient of one that is trained is
    summed in float32 and kept once, in the head's dtype and sharded as the head.

    Args:
        params: of which the head is used, `lm_head` or tied embeddings.
        hidden: as `forward` returns it.
        targets: tokens of the vocabulary; any, where the result is not used.
    """
    tied = config.tie_word_embeddings
    matrix = params["embed" if tied else "lm_head"]
    return _token_losses(_Head(config.vocab_size, tied), hidden, matrix, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(head: _Head, hidden, matrix, targets) -> TokenLosses:
    of_hidden, of_matrix, of_place = _specs(head, targets.shape)
    body = functools.partial(_forward, head)
    run = meshes.per_device(body, (of_hidden, of_matrix, of_place), of_place)
    return run(hidden, matrix, targets)


def _kept(head: _Head, hidden, matrix, targets):
    """The forward rule; what it keeps tells by its structure whether the head is trained."""
    arrays = hidden.value, matrix.value, targets.value
    found = _token_losses(head, *arrays)
    return found, (*arrays, found.log_sum_exp, () if matrix.perturbed else None)


def _gradients(head: _Head, kept, d_found):
    """The backward rule: the gradients of hidden states and head."""
    *arrays, trained = kept
    shape = arrays[-1].shape
    d_nats, d_log_sum_exp = (
        jnp.zeros(shape) if isinstance(d, SymbolicZero) else d for d in d_found[:2]
    )
    of_hidden, of_matrix, of_place = _specs(head, shape)
    in_specs = (of_hidden, of_matrix, *4 * (of_place,))
    out_specs = (of_hidden, None if trained is None else of_matrix)
    body = functools.partial(_backward, head, trained is not None, _token_axes(shape))
    run = meshes.per_device(body, in_specs, out_specs)
    return *run(*arrays, d_nats, d_log_sum_exp), None


_token_losses.defvjp(_kept, _gradients, symbolic_zeros=True)


def _specs(head: _Head, shape: tuple[int, ...]) -> tuple[PartitionSpec, ...]:
    """How hidden states, the head, and a number for each place [B, S] lie on the mesh."""
    mesh = meshes.current_mesh()
    if mesh is None:
        return 3 * (PartitionSpec(),)
    of_place = meshes.activation_spec(mesh, ("batch", "length"), shape)
    return of_place, meshes.param_spec(head.axes), of_place


def _token_axes(shape: tuple[int, ...]) -> tuple[str, ...]:
    mesh = meshes.current_mesh()
    return () if mesh is None else meshes.token_axes(mesh, shape)


# What follows runs on one device.


class _Chunk(NamedTuple):
    """A part of the device's part of the vocabulary."""

    start: Int[Array, ""]  # its place in the device's matrix
    matrix: Float[Array, "..."]  # [D, C], or [C, D] of tied embeddings
    token: Int[Array, "C"]
    counts: Bool[Array, "C"]  # neither padding nor of the chunk before


def chunk_size(length: int, tokens: int, embed: int) -> int:
    """How much of a device's vocabulary, of the given length, is a chunk."""
    most = max(LEAST_CHUNK, CHUNK_BYTES // (4 * max(tokens, embed)))
    even = math.ceil(length / math.ceil(length / most))
    return min(length, ALIGNED * math.ceil(even / ALIGNED))


def _loop(head: _Head, matrix, rows: Float[Array, "T D"], add: Callable, start: Any) -> Any:
    """Folds `add(carry, chunk)` over the chunks of a device; the last may overlap with another."""
    axis = head.axis("vocab")
    length = matrix.shape[axis]
    size = chunk_size(length, *rows.shape)
    embed, vocab = meshes.sharded_axes("embed"), meshes.sharded_axes("vocab")
    first_token = lax.axis_index(vocab) * length if vocab else 0

    def step(i, carry):
        start = jnp.minimum(i * size, length - size)
        part = lax.dynamic_slice_in_dim(matrix, start, size, axis)
        if embed:  # gathered chunk by chunk, so that no device ever has the whole
            part = lax.all_gather(part, embed, axis=head.axis("embed"), tiled=True)
        column = start + jnp.arange(size)
        token = first_token + column
        return add(
            carry, _Chunk(start, part, token, (column >= i * size) & (token < head.vocab_size))
        )

    return lax.fori_loop(0, math.ceil(length / size), step, start)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The einsum in float32."""
    highest = lax.Precision.HIGHEST
    return jnp.einsum(subscripts, a, b, precision=highest, preferred_element_type=jnp.float32)


def _logits(head: _Head, rows: Float[Array, "T D"], chunk: _Chunk) -> Float[Array, "T C"]:
    product = _product(f"TD,{head.letters}->TC", rows, chunk.matrix)
    return jnp.where(chunk.counts, product, LOWEST)


def _at_target(chunk: _Chunk, x: jax.Array, targets: Int[Array, "T"]) -> Float[Array, "T C"]:
    """`x` at each place's target, if the chunk has it; 0 elsewhere."""
    return jnp.where((chunk.token == targets[:, None]) & chunk.counts, x, 0.0)


def _forward(head: _Head, hidden, matrix, targets) -> TokenLosses:
    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)

    def add(running, chunk: _Chunk):
        largest, total, chosen = running
        logits = _logits(head, rows, chunk)
        larger = jnp.maximum(largest, jnp.max(logits, axis=1))
        new = jnp.sum(jnp.exp(logits - larger[:, None]), axis=1)
        chosen += jnp.sum(_at_target(chunk, logits, wanted), axis=1)
        return larger, total * jnp.exp(largest - larger) + new, chosen

    zeros = jnp.zeros(wanted.shape)
    largest, total, chosen = _loop(head, matrix, rows, add, (zeros + LOWEST, zeros, zeros))
    vocab = meshes.sharded_axes("vocab")
    largest_of_all = lax.pmax(largest, vocab)
    total, chosen = lax.psum((total * jnp.exp(largest - largest_of_all), chosen), vocab)
    log_sum_exp = largest_of_all + jnp.log(total)
    found = TokenLosses(log_sum_exp - chosen, log_sum_exp, chosen >= largest_of_all)
    return TokenLosses(*(x.reshape(targets.shape) for x in found))


def _backward(
    head: _Head, trained: bool, token_axes: tuple[str, ...], hidden, matrix, targets, *numbers
):
    """The gradients of the device's hidden states, and of its part of the head if it is trained.

    Args:
        token_axes: the mesh axes along which devices have different tokens.
        numbers: of each place: its log-sum-exp, and the gradients of its nats and log-sum-exp.
    """
    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    log_sum_exp, d_nats, d_log_sum_exp = (x.reshape(-1, 1) for x in numbers)

    def add(sums, chunk: _Chunk):
        d_rows, d_matrix = sums
        p = jnp.exp(_logits(head, rows, chunk) - log_sum_exp)
        d_logits = p * (d_nats + d_log_sum_exp) - _at_target(chunk, d_nats, wanted)
        d_logits = d_logits.astype(hidden.dtype)
        d_rows += _product(f"TC,{head.letters}->TD", d_logits, chunk.matrix)
        if trained:
            part = _product(f"TC,TD->{head.letters}", d_logits, rows)
            part = _sum_of_devices(part, head.axis("embed"), token_axes)
            d_matrix = _add_slice(d_matrix, part, chunk.start, head.axis("vocab"))
        return d_rows, d_matrix

    start = jnp.zeros(rows.shape, jnp.float32), jnp.zeros_like(matrix) if trained else None
    d_rows, d_matrix = _loop(head, matrix, rows, add, start)
    d_rows = lax.psum(d_rows, meshes.sharded_axes("vocab"))
    return d_rows.astype(hidden.dtype).reshape(hidden.shape), d_matrix


def _sum_of_devices(
    part: Float[Array, "..."], axis: int, token_axes: tuple[str, ...]
) -> Float[Array, "..."]:
    """The sum over devices with different tokens; of it the device's slice of `embed`, an axis."""
    embed = meshes.sharded_axes("embed")
    if embed and set(embed) <= set(token_axes):
        part = lax.psum_scatter(part, embed, scatter_dimension=axis, tiled=True)
    elif embed:
        size = part.shape[axis] // lax.axis_size(embed)
        part = lax.dynamic_slice_in_dim(part, lax.axis_index(embed) * size, size, axis)
    part = lax.psum(part, tuple(name for name in token_axes if name not in embed))
    return lax.optimization_barrier(part)  # else XLA sums after the loop, the whole in float32


def _add_slice(x: jax.Array, part: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    """`x` with `part` added from `start` on along an axis; in place within a loop."""
    old = lax.dynamic_slice_in_dim(x, start, part.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(x, (old + part).astype(x.dtype), start, axis)
