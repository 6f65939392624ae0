"""Tokens to vectors and vectors to logits, with the vocabulary sharded over the mesh.

Where the mesh does not divide the vocabulary, V here is more than `vocab_size`: no token has the
rest of the table, and logits end before it.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmoe import mesh as meshes
from jaxmoe.config import Llama4Config
from jaxmoe.model.layers import linear


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


def unembed(
    config: Llama4Config, params: dict, hidden: Float[Array, "*batch D"]
) -> Float[Array, "*batch vocab"]:
    """Logits [..., vocab] in float32."""
    if config.tie_word_embeddings:
        table = meshes.constrain_param(params["embed"], ("vocab", "embed"))
        logits = linear("...D,VD->...V", hidden, table)
    else:
        head = meshes.constrain_param(params["lm_head"], ("embed", "vocab"))
        logits = linear("...D,DV->...V", hidden, head)
    return logits[..., : config.vocab_size].astype(jnp.float32)
