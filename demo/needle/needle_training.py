"""Trains the needle model: rows of growing length, attention kept blunt so that it grows sharp."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from demo.needle import needle_data
from jaxmoe.config import Llama4Config
from jaxmoe.model.transformer import forward, unembed
from jaxmoe.train.config import OptimizerConfig
from jaxmoe.train.loss import cross_entropy_sum, next_tokens, router_losses
from jaxmoe.train.optimizer import make_optimizer
from jaxmoe.train.state import SavedStates, TrainState, abstract_state, init_state

OPTIMIZER = OptimizerConfig(peak_lr=0.003, warmup_steps=100, final_lr=0.05, weight_decay=0.01)
ROUTER_LOSS = 0.01
# Queries are multiplied by a factor drawn from here, in training only. A model that finds its
# needle among a thousand tokens with blunt attention has the margin for a million with its own.
BLUNT = (0.4, 1.0)
TAIL = 16  # tokens at the end of a row that hold the answer
Record = dict[str, Any]
LOG_EVERY, SAVE_EVERY = 25, 100


@dataclasses.dataclass(frozen=True)
class Stage:
    """So many steps with rows of one length."""

    steps: int
    length: int
    rows: int


STAGES = (
    Stage(steps=400, length=64, rows=32),
    Stage(steps=500, length=256, rows=8),
    Stage(steps=400, length=1024, rows=4),
    Stage(steps=240, length=8192, rows=1),
)


def stage_of(step: int, stages: tuple[Stage, ...]) -> Stage:
    """The stage that a step, counted from 0, belongs to."""
    for stage in stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise ValueError("the step is past the last stage")


def train(
    model: Llama4Config,
    task: needle_data.Task,
    folder: Path,
    seed: int,
    mesh: jax.sharding.Mesh,
    report: Callable[[Record], None],
) -> dict:
    """Trains, or goes on from the state in `folder`; returns the parameters.

    Args:
        report: called with a record of metrics every `LOG_EVERY` steps.
    """
    steps = sum(stage.steps for stage in STAGES)
    optimizer = make_optimizer(OPTIMIZER, model, steps)
    step_fn = make_step(model, optimizer)
    abstract = abstract_state(model, optimizer, mesh)
    with SavedStates.open(folder / "states") as states:
        state = states.newest(abstract) or init_state(model, optimizer, mesh, seed)
        for step in range(int(state.step), steps):
            stage, done = stage_of(step, STAGES), step + 1
            rows = task.rows(seed, step, stage.rows, stage.length)
            factor = np.random.default_rng((seed, step, 1)).uniform(*BLUNT)
            state, results = step_fn(state, rows, factor)
            if done % LOG_EVERY == 0 or done == steps:
                numbers = {name: round(float(value), 6) for name, value in results.items()}
                report({"step": done, "length": stage.length, **numbers})
            if done % SAVE_EVERY == 0 or done == steps:
                states.save(state)
    return state.params


def make_step(model: Llama4Config, optimizer: optax.GradientTransformation):
    """The compiled step: (state, rows, bluntness) -> (state, results)."""

    def step(state: TrainState, rows: needle_data.Rows, factor: jax.Array):
        losses = jax.grad(loss, has_aux=True, argnums=1)
        gradient, results = losses(model, state.params, rows, factor)
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = cast(dict, optax.apply_updates(state.params, updates))
        return TrainState(params, moments, state.step + 1), results

    return jax.jit(step, donate_argnums=0)


def loss(model: Llama4Config, params: dict, rows: needle_data.Rows, factor: jax.Array):
    """Cross entropy of the answers alone, with the routers' balance; and how many are right."""
    tokens, positions, answer = map(jnp.asarray, rows)
    real = jnp.ones_like(tokens)
    out = forward(model, blunt(params, factor), tokens, positions, real)
    tokens, answer = tokens[:, -TAIL:], answer[:, -TAIL:]
    logits = unembed(model, params, out.hidden[:, -TAIL:])
    total, count = cross_entropy_sum(logits, tokens, answer)
    balance, health = router_losses(out.router_stats)
    targets, counted = next_tokens(tokens, answer)
    right = jnp.all((jnp.argmax(logits, -1) == targets) | ~counted, axis=1)
    results = {"loss": total / count, "right": right.mean(), "router_peak": health.peak.max()}
    return total / count + ROUTER_LOSS * balance, results


def blunt(params: dict, factor: jax.Array) -> dict:
    """The parameters with every attention score multiplied by `factor`."""

    def layer(p: dict) -> dict:
        return p | {"attention": p["attention"] | {"q": p["attention"]["q"] * factor}}

    return params | {"layers": [layer(p) for p in params["layers"]]}
