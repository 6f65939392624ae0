"""AdamW with a linear warm-up, a cosine decay and clipping by global norm."""

import jax
import optax

from jaxmoe.train.config import OptimizerConfig


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
    """The optimizer of a run; vectors, which are the weights of norms, do not decay."""

    def decays(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    clips = config.clip_norm > 0
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if clips else optax.identity(),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )
