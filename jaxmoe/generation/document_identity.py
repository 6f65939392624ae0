"""What a saved document belongs to: the model, the cache and the text that its keys depend on."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint import store
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.images.picture import Picture
from jaxmoe.model.kv_cache import PAGE
from jaxmoe.model.lora import is_lora

DIFFERENCES = {  # by key of an identity, in the order in which they are told
    "text": "another text",
    "dtype": "with a model in {theirs}, not {ours}",
    "config": "with a model of another config",
    "weights": "with a model of other weights",
    "adapter": "with another adapter",
    "kv": "into a {theirs} cache, not {ours}",
    "page": "into pages of another number of tokens",
}


def model_identity(config: Llama4Config, params: dict, kv: str | None) -> dict[str, Any]:
    """What the keys and values of a text depend on beside it; a vision tower is no part of it.

    Args:
        kv: how keys and values are stored; default: as parameters.
    """
    dtype = params["embed"].dtype.name
    config = dataclasses.replace(config, vision=None)
    params = {name: value for name, value in params.items() if name != "vision"}
    return json.loads(json.dumps(store.model_metadata(config, dtype))) | {
        "dtype": dtype,
        "weights": _fingerprint(params),
        "kv": {None: dtype, "bf16": "bfloat16"}.get(kv, kv),
        "page": PAGE,
    }


def text_identity(
    tokens: Sequence[int] | np.ndarray, pictures: Sequence[Picture], params: dict
) -> dict[str, Any]:
    """The length of a text, and a digest of its tokens, of its pictures and of what sees them."""
    digest = hashlib.sha256(np.asarray(tokens, "<i4").tobytes())
    if len(pictures):
        digest.update(_fingerprint(params.get("vision", {})).encode())
    for picture in pictures:
        digest.update(picture.digest)
    return {"length": len(tokens), "text": digest.hexdigest()}


def check_same(theirs: dict[str, Any], ours: dict[str, Any], subject: str) -> None:
    """Checks that a document was read as it is to be used now.

    Args:
        theirs: the identity of the document.
        ours: the identity of now; keys that it lacks are not compared.
        subject: how the error message begins, up to "was read".

    Raises:
        UserError: naming the first of `DIFFERENCES`.
    """
    for key, difference in DIFFERENCES.items():
        if key in ours and theirs.get(key) != ours[key]:
            found = difference.format(theirs=theirs.get(key), ours=ours[key])
            raise UserError(f"{subject} {found}; use the same again, or another folder.")


def _fingerprint(params: dict) -> str:
    """A digest of all parameters' bits. It sums integers, so it is the same on every mesh."""
    sums = [int(x) for x in jax.tree.leaves(_sum_bits(params))]
    digest = hashlib.sha256(np.asarray(sums, "<u4").tobytes())
    scales = [w.scale for w in jax.tree.leaves(params, is_leaf=is_lora) if is_lora(w)]
    digest.update(np.asarray(scales, "<f8").tobytes())  # of adapters
    return digest.hexdigest()


@jax.jit
def _sum_bits(params):
    def bits(x):
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        return jnp.sum(jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32))

    return jax.tree.map(bits, params)
