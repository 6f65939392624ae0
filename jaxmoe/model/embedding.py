"""Tokens to vectors and vectors to logits, with the vocabulary sharded over the mesh.

Where the mesh does not divide the vocabulary, V here is more than `vocab_size`: no token has the
rest of the table, and logits end before it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmoe import mesh as meshes
from jaxmoe.config import Llama4Config
from jaxmoe.model.kv_cache import row_groups
from jaxmoe.model.layers import linear
from pallas_kernels.mosaic import why_not_hopper
from pallas_kernels.quantized import QuantizedMatrix
from pallas_kernels.step import matmul_few, why_not_few


def embed(table: Float[Array, "V D"], tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """Each token's row of the table, from the device that has its part of the vocabulary."""
    mesh = meshes.current_mesh()
    if mesh is None:
        return table[tokens]
    vocab = meshes.RULES["vocab"]

    def body(table, tokens):
        index = tokens - lax.axis_index(vocab) * table.shape[0]
        here = (index >= 0) & (index < table.shape[0])
        rows = table[jnp.where(here, index, 0)]
        return lax.psum(jnp.where(here[..., None], rows, 0), vocab)

    out_spec = meshes.activation_spec(mesh, ("batch", "length", None), (*tokens.shape, 1))
    token_spec = meshes.activation_spec(mesh, ("batch", "length"), tokens.shape)
    in_specs = (meshes.param_spec_at_use(("vocab", "embed")), token_spec)
    return meshes.per_device(body, in_specs, out_spec)(table, tokens)


def with_features(
    config: Llama4Config,
    x: Float[Array, "B S D"],
    tokens: Int[Array, "B S"],
    features: Float[Array, "N D"],
) -> Float[Array, "B S D"]:
    """The embeddings x of tokens, with `features[i]` where a token is `vocab_size + i`."""
    index = tokens - config.vocab_size
    given = features[jnp.clip(index, 0, len(features) - 1)].astype(x.dtype)
    return jnp.where((index >= 0)[..., None], given, x)


def unembed(
    config: Llama4Config, params: dict, hidden: Float[Array, "*batch D"]
) -> Float[Array, "*batch vocab"]:
    """Logits [..., vocab] in float32."""
    if config.tie_word_embeddings:
        table = meshes.constrain_param(params["embed"], ("vocab", "embed"))
        logits = linear("...D,VD->...V", hidden, table)
    else:
        head = meshes.constrain_param(params["lm_head"], ("embed", "vocab"))
        by_kernel = _why_not_by_kernel(hidden, head) is None
        logits = (_by_kernel if by_kernel else _by_xla)(hidden, head)
    return logits[..., : config.vocab_size].astype(jnp.float32)


def _by_xla(hidden: Float[Array, "*batch D"], head) -> Float[Array, "*batch V"]:
    return linear("...D,DV->...V", hidden, head)


@jax.custom_vjp
def _by_kernel(hidden: Float[Array, "B D"], head: Float[Array, "D V"]) -> Float[Array, "B V"]:
    """hidden @ head for one row a device on Hopper, where XLA reads `head` at half memory speed."""

    def body(hidden, head):
        return matmul_few(hidden, (head,))[0, : len(hidden)].astype(hidden.dtype)

    mesh = meshes.current_mesh()
    if mesh is None:
        return body(hidden, head)
    rows = meshes.activation_axes(mesh, "batch", len(hidden))
    in_specs = meshes.sharded_spec(mesh, rows), meshes.param_spec_at_use(("embed", "vocab"))
    out_spec = meshes.sharded_spec(mesh, rows, meshes.RULES["vocab"])
    return meshes.per_device(body, in_specs, out_spec)(hidden, head)


_by_kernel.defvjp(
    lambda hidden, head: (_by_kernel(hidden, head), (hidden, head)),
    lambda saved, d_logits: jax.vjp(_by_xla, *saved)[1](d_logits),
)


def _why_not_by_kernel(hidden, head) -> str | None:
    if hidden.ndim != 2 or isinstance(head, QuantizedMatrix) or head.dtype != hidden.dtype:
        return "it takes a row of hidden values for each sequence, and a matrix of their dtype"
    mesh, rows, (inputs, outputs) = meshes.current_mesh(), hidden.shape[0], head.shape
    rows //= row_groups(rows)
    outputs //= 1 if mesh is None else meshes.axis_size(mesh, "vocab")
    if rows > 1:
        return f"it takes one row a device, not {rows}; XLA multiplies more at the speed of memory"
    return why_not_few(rows, hidden.dtype.name, inputs, [outputs]) or why_not_hopper()
