"""The optimizers: AdamW, Adafactor and Muon, with one schedule, one decay and one clipping."""

import math
from typing import Any

import jax
import optax

from jaxmoe.train.config import OptimizerConfig
from jaxmoe.train.factored import scale_by_factored_moments
from jaxmoe.train.matrices import is_hidden, matrix_axes
from jaxmoe.train.muon import scale_by_orthogonal_mean
from jaxmoe.train.partition import dotted

MUON_BETA = 0.95  # of Muon's own running mean
MUON_SIZE = 0.2  # root mean square of its updates, AdamW's usual one (Moonlight, Liu et al. 2025)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """From 0 up to `peak_lr` over the warm-up, then down a cosine to its `final_lr` fraction."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.peak_lr * config.final_lr,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run; vectors, which are the weights of norms, do not decay.

    It takes float32 gradients and parameters, whatever the parameters are stored in.
    """

    def decays(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    clips = config.clip_norm > 0
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if clips else optax.identity(),
        _direction(config),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """What turns gradients into a direction whose entries are about 1 at most."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, mu_dtype=config.moments)
    if config.name == "adamw":
        return adam
    if config.name == "adafactor":
        return scale_by_factored_moments()
    muon = optax.chain(
        scale_by_orthogonal_mean(MUON_BETA, config.moments),
        optax.stateless(_alike_in_size),
    )
    return optax.partition({"muon": muon, "adam": adam}, _labels)


def _labels(params: Any) -> Any:
    def label(path: tuple, p: Any) -> str:
        return "muon" if is_hidden(dotted(path), p.ndim) else "adam"

    return jax.tree.map_with_path(label, params)


def _alike_in_size(updates: Any, params: Any) -> Any:
    """Scales orthogonal matrices so that their entries have the root mean square `MUON_SIZE`."""

    def scaled(path: tuple, u: jax.Array) -> jax.Array:
        axes = matrix_axes(dotted(path), u.ndim)
        assert axes is not None
        longest = max(math.prod(u.shape[i] for i in side) for side in axes)
        return MUON_SIZE * math.sqrt(longest) * u

    return jax.tree.map_with_path(scaled, updates)
