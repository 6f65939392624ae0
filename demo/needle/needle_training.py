"""Trains the needle model: rows of growing length, attention kept blunt so that it grows sharp."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from demo.needle import needle_data
from jaxmoe.config import Llama4Config
from jaxmoe.model.transformer import forward
from jaxmoe.train import trainer
from jaxmoe.train.config import OptimizerConfig, TrainConfig
from jaxmoe.train.cross_entropy import token_losses
from jaxmoe.train.loss import mean, next_tokens
from jaxmoe.train.router_losses import router_losses

OPTIMIZER = OptimizerConfig(peak_lr=0.003, warmup_steps=100, final_lr=0.05, weight_decay=0.01)
ROUTER_LOSS = 0.01
# Queries are multiplied by a factor drawn from here, in training only. A model that finds its
# needle among a thousand tokens with blunt attention has the margin for a million with its own.
BLUNT = (0.4, 1.0)
TAIL = 16  # tokens at the end of a row that hold the answer
Record = dict[str, Any]
LOG_EVERY, SAVE_EVERY = 25, 100


class Batch(NamedTuple):
    """The rows of a step as in `needle_data.Rows`, and the factor of its queries."""

    tokens: np.ndarray
    positions: np.ndarray
    answer: np.ndarray
    factor: np.float32


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the training: a number of steps with rows of one length."""

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


def run_config(model: dict, tokenizer: Path, output: Path, seed: int) -> TrainConfig:
    """The run that makes the model."""
    return TrainConfig(
        model=model,
        data=None,
        optimizer=OPTIMIZER,
        output=str(output),
        steps=sum(stage.steps for stage in STAGES),
        tokenizer=str(tokenizer),
        seed=seed,
        log_every=LOG_EVERY,
        save_every=SAVE_EVERY,
    )


def batch(task: needle_data.Task, seed: int, step: int) -> Batch:
    """The rows of one step, and how blunt its attention is."""
    stage = stage_of(step, STAGES)
    rows = task.rows(seed, step, stage.rows, stage.length)
    factor = np.random.default_rng((seed, step, 1)).uniform(*BLUNT)
    return Batch(*rows, np.float32(factor))


def train(config: TrainConfig, task: needle_data.Task, mesh: jax.sharding.Mesh) -> Iterator[Record]:
    """Trains, or goes on where a run was killed; yields records of metrics."""
    batches = functools.partial(batch, task, config.seed)
    return trainer.train(config, mesh, loss=loss, batches=batches)


def loss(model: Llama4Config, params: dict, batch: Batch):
    """Cross entropy of the answers alone, with the routers' balance; and how many are right."""
    tokens, positions, answer, factor = map(jnp.asarray, batch)
    length = tokens.shape[1]
    real = jnp.ones_like(tokens)
    out = forward(model, blunt(params, factor), tokens, positions, real)
    tokens, answer = tokens[:, -TAIL:], answer[:, -TAIL:]
    targets, counted = next_tokens(tokens, answer)
    found = token_losses(model, params, out.hidden[:, -TAIL:], targets)
    cross_entropy = mean(found.nats, counted)
    balance, health = router_losses(out.router_stats)
    right = jnp.all(found.right | ~counted, axis=1)
    results = {"loss": cross_entropy, "right": right.mean(), "router_peak": health.peak.max()}
    results["length"] = jnp.int32(length)
    return cross_entropy + ROUTER_LOSS * balance, results


def blunt(params: dict, factor: jax.Array) -> dict:
    """The parameters with every attention score multiplied by `factor`."""

    def layer(p: dict) -> dict:
        return p | {"attention": p["attention"] | {"q": p["attention"]["q"] * factor}}

    return params | {"layers": [layer(p) for p in params["layers"]]}
