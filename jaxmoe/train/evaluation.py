"""The held-out loss: the mean cross entropy of batches that are not trained on."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import Llama4Config
from jaxmoe.model import transformer
from jaxmoe.model.steps import Inputs, step
from jaxmoe.model.vision import tile_features
from jaxmoe.progress import note_work
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.data import Batch
from jaxmoe.train.loss import summed_cross_entropy
from jaxmoe.train.metrics import HELD_OUT_LOSS
from jaxmoe.train.pictures import PictureBatch
from jaxmoe.train.step import cast_all


def held_out_loss(
    config: TrainConfig,
    model: Llama4Config,
    params: dict,
    *,
    batches: Iterable[Any],
    forward: Callable = transformer.forward,
) -> dict[str, Any]:
    """Mean cross entropy in nats a target over all batches; empty if there are none.

    Also of each source that has targets among them, if `config` mixes several.
    """
    params = cast_all(params, config.dtype)
    names = config.data.source_names if config.data is not None else ()
    sums: list[tuple[jax.Array, jax.Array]] = []
    for batch in batches:
        jax.block_until_ready(sums[-2:-1])  # the device has the next one to do meanwhile
        note_work()
        sums.append(_sum(model, params, batch, forward, len(names)))
    if not sums:
        return {}
    nats, targets = np.sum(jax.device_get(sums), axis=0)
    kinds = [HELD_OUT_LOSS, *(f"{HELD_OUT_LOSS}/{name}" for name in names)]
    found = zip(kinds, nats, targets, strict=True)
    return {name: float(x / count) for name, x, count in found if count or name == HELD_OUT_LOSS}


def _sum(
    model: Llama4Config,
    params: dict,
    batch: Batch | PictureBatch,
    forward: Callable,
    sources: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """The cross entropy of a batch's targets, and their number; then those of each source."""
    tokens, segment_ids, learned = batch[:3]
    targets, features = tokens, None
    if isinstance(batch, PictureBatch):
        features = _features(model, params["vision"], batch.pixels)
        is_text = tokens < model.vocab_size  # the places of features are no targets
        targets = np.where(is_text, tokens, model.image_token_id)
        learned = batch.learned & is_text
    rows = jax.tree.map(jnp.asarray, (targets, segment_ids, learned))
    if sources:
        rows = (*rows, jnp.asarray(batch.source), jnp.arange(sources))
    inputs = Inputs(jnp.asarray(tokens), None, rows[1])
    kept = {"readout": summed_cross_entropy, "arguments": rows, "features": features}
    return step(model, params, inputs, None, forward=forward, **kept)[0]


@functools.partial(jax.jit, static_argnums=0)
def _features(model: Llama4Config, params: dict, pixels: jax.Array) -> jax.Array:
    features = tile_features(model, params, pixels)
    return features.reshape(-1, features.shape[-1])
