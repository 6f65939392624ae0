"""The training loop: batches in, records of metrics out, a checkpoint at the end."""

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import optax

from jaxmoe.checkpoint import store
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.hf_config import from_hf
from jaxmoe.model.transformer import forward, positions_of, unembed
from jaxmoe.train import data
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.loss import Losses, cross_entropy_sum, losses
from jaxmoe.train.optimizer import learning_rate, make_optimizer
from jaxmoe.train.state import SavedStates, TrainState, abstract_state, init_state

Record = dict[str, Any]


def train(config: TrainConfig, mesh: jax.sharding.Mesh, source: str) -> Iterator[Record]:
    """Trains, or goes on where a run of the same config was killed.

    In `config.output`: `checkpoint` at the end, `metrics.jsonl` with a record every `log_every`
    steps, `config.json`, and `states` to resume from. On the same devices a resumed run takes the
    same steps as one that was never killed.

    Args:
        config: the run.
        mesh: the devices; the caller has set it with `jax.set_mesh`.
        source: what error messages call the config, usually its file.

    Yields:
        Each record as it is written.

    Raises:
        UserError: for a bad model, data that is too short, or an output that is not this run's.
    """
    model = from_hf(config.model, f"{source}, model")
    tokens = _tokens(config, model)
    optimizer = make_optimizer(config.optimizer, model, config.steps)
    abstract = abstract_state(model, optimizer, mesh)
    folder = Path(config.output)
    _claim(folder, config)
    with SavedStates.open(folder / "states") as states:
        state = start = states.newest(abstract) or init_state(model, optimizer, mesh, config.seed)
        metrics = folder / "metrics.jsonl"
        _cut_back(metrics, int(start.step))
        for done, state, record in _steps(config, model, optimizer, tokens, start):
            if record:
                with open(metrics, "a") as file:
                    file.write(json.dumps(record) + "\n")
                yield record
            if _every(config.save_every, done):
                states.save(state)
    _finish(config, model, state.params)


def _steps(
    config: TrainConfig,
    model: Llama4Config,
    optimizer: optax.GradientTransformation,
    tokens: tuple[np.ndarray, np.ndarray],
    state: TrainState,
) -> Iterator[tuple[int, TrainState, Record]]:
    """Each further step, the state after it, and a record; it is empty where none is due."""
    step_fn = make_step(config, model, optimizer)
    evaluate = functools.partial(held_out_loss, config, model, tokens=tokens[1])
    rate = learning_rate(config.optimizer, config.steps)
    since, start = int(state.step), time.perf_counter()
    for step in range(since, config.steps):
        state, result, norm = step_fn(state, *_training_batch(config, model, tokens[0], step))
        done, record = step + 1, {}
        if _every(config.log_every, done) or done == config.steps:
            record = _record(done, jax.device_get(result), float(norm), rate(step))
            seconds = time.perf_counter() - start
            rows = (done - since) * config.data.batch_size
            record["tokens_per_second"] = round(rows * config.data.length / seconds, 1)
        if _every(config.evaluate_every, done) or done == config.steps:
            record |= {"step": done} | evaluate(state.params)
        if record:
            since, start = done, time.perf_counter()
        yield done, state, record


def make_step(config: TrainConfig, model: Llama4Config, optimizer: optax.GradientTransformation):
    """The compiled step: (state, tokens, segment_ids) -> (state, losses, gradient norm).

    The state is donated: its memory becomes the new state's.
    """

    def total(params: dict, tokens: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, Losses]:
        params = jax.tree.map(lambda p: p.astype(config.dtype), params)
        result = losses(model, params, tokens, segment_ids, config.router_loss, config.remat)
        return result.total, result

    def step(state: TrainState, tokens: jax.Array, segment_ids: jax.Array):
        gradient, result = jax.grad(total, has_aux=True)(state.params, tokens, segment_ids)
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = cast(dict, optax.apply_updates(state.params, updates))
        return TrainState(params, moments, state.step + 1), result, optax.tree.norm(gradient)

    return jax.jit(step, donate_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(model: Llama4Config, params: dict, tokens: jax.Array, segment_ids: jax.Array):
    out = forward(model, params, tokens, positions_of(segment_ids), segment_ids)
    return cross_entropy_sum(unembed(model, params, out.hidden), tokens, segment_ids)


def held_out_loss(
    config: TrainConfig, model: Llama4Config, params: dict, *, tokens: np.ndarray
) -> Record:
    """Mean cross entropy in nats a token, in rows as in training; empty if there are no tokens."""
    if not len(tokens):
        return {}
    params = jax.tree.map(lambda p: p.astype(config.dtype), params)
    batches = data.held_out_batches(
        tokens, model.bos_token_id, length=config.data.length, rows=config.data.batch_size
    )
    results = [_evaluate(model, params, *batch) for batch in batches]
    return {"held_out_loss": float(sum(r[0] for r in results) / sum(r[1] for r in results))}


def _record(step: int, result: Losses, norm: float, rate: Any) -> Record:
    """Plain numbers; of the routers the worst layer and each expert's load."""
    health = result.health
    record = {
        "step": step,
        "loss": float(result.cross_entropy),
        "balance_loss": float(result.balance),
        "gradient_norm": norm,
        "learning_rate": float(rate),
    }
    if len(health.peak):
        record["router_peak"] = float(health.peak.max())
        record["router_entropy"] = float(health.entropy.min())
        record["router_load"] = np.round(health.load, 4).tolist()
        record["dropped"] = int(health.dropped)
    return record


def _tokens(config: TrainConfig, model: Llama4Config) -> tuple[np.ndarray, np.ndarray]:
    """Training tokens and held-out tokens."""
    tokens = data.read_tokens(config.data.tokens)
    if len(tokens) and tokens.max() >= model.vocab_size:
        raise UserError(
            f"{config.data.tokens} holds token {tokens.max()}, but the model's vocab_size is "
            f"{model.vocab_size}; make it with the model's tokenizer."
        )
    return data.split(tokens, model.bos_token_id, config.data.held_out_every)


def _training_batch(
    config: TrainConfig, model: Llama4Config, tokens: np.ndarray, step: int
) -> data.Batch:
    return data.training_batch(
        tokens,
        model.bos_token_id,
        length=config.data.length,
        rows=config.data.batch_size,
        seed=config.seed,
        step=step,
    )


def _claim(folder: Path, config: TrainConfig) -> None:
    """Makes the run's folder, or checks that it is one of the same run, not finished."""
    own = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    file = folder / "config.json"
    if (folder / "checkpoint").exists():
        raise UserError(f"{folder} holds a finished run; choose another output or delete it.")
    if file.exists():
        if file.read_text() != own:
            raise UserError(
                f"{folder} holds a run of another config ({file}); choose another output, delete "
                "it, or restore the config to resume that run."
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is no training run; choose another output.")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(own)


def _finish(config: TrainConfig, model: Llama4Config, params: dict) -> None:
    """Writes the checkpoint that the other scripts read; nothing is left to resume from."""
    folder = Path(config.output)
    params = jax.tree.map(lambda p: p.astype(config.checkpoint_dtype), params)
    store.save(folder / "checkpoint", model, params)
    if config.tokenizer is not None:
        store.copy_companions(Path(config.tokenizer), folder / "checkpoint")
    shutil.rmtree(folder / "states")


def _every(period: int, step: int) -> bool:
    return period > 0 and step % period == 0


def _cut_back(metrics: Path, step: int) -> None:
    """Removes the records of steps that will be taken again, and a line cut short."""
    if metrics.exists():
        lines = metrics.read_text().splitlines(keepends=True)
        whole = (line for line in lines if line.endswith("}\n"))
        metrics.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
