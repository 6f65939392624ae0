"""The training loop: batches in, records of metrics out, a checkpoint at the end."""

import functools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
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
from jaxmoe.train.run_folder import RunFolder
from jaxmoe.train.state import (
    SavedStates,
    TrainState,
    abstract_state,
    init_state,
    state_of,
)

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
        Each record as it is written; nothing if the run was finished before.

    Raises:
        UserError: before anything is written, for a bad model or checkpoint, tokens that cannot be
            trained on, or an output that is not this run's; for a disk that fails; and at a step
            whose loss or gradient is not finite, with the state before it saved.
    """
    folder = RunFolder(config)
    if folder.is_finished():
        return
    model = _model(config, source)
    tokens = _tokens(config, model)
    optimizer = make_optimizer(config.optimizer, model, config.steps)
    abstract = abstract_state(model, optimizer, mesh)
    with folder.claimed():
        with SavedStates.open(folder.states) as states:
            state = start = states.newest(abstract) or _first_state(config, model, optimizer, mesh)
            folder.cut_back(int(start.step))
            for done, state, record in _steps(config, model, optimizer, tokens, start):
                if what := _not_finite(done, state, record):
                    states.save(state)
                    raise UserError(
                        f"{source}: {what} is not finite at step {done}; the state after step "
                        f"{state.step} is kept in {folder.states}, but the same config would fail "
                        "again: lower 'peak_lr', or look at the data."
                    )
                if record:
                    folder.append(record)
                    yield record
                if _every(config.save_every, done):
                    states.save(state)
        params = jax.tree.map(lambda p: p.astype(config.checkpoint_dtype), state.params)
        folder.finish(model, params)


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

    Where the loss or the norm is not finite, the state stays what it was, its number of steps too.
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
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(result.total) & jnp.isfinite(norm)
        after = TrainState(params, moments, state.step + 1)
        return jax.tree.map(functools.partial(jnp.where, finite), after, state), result, norm

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


def _not_finite(step: int, state: TrainState, record: Record) -> str | None:
    """What is not finite, if anything; this waits for the step."""
    if int(state.step) < step:
        return "the loss or its gradient"
    numbers = {key: value for key, value in record.items() if isinstance(value, float)}
    return next((key for key, value in numbers.items() if not math.isfinite(value)), None)


def _model(config: TrainConfig, source: str) -> Llama4Config:
    """The model, once it is known that there is all that the finished checkpoint will need."""
    tokenizer = config.tokenizer
    if tokenizer and not any((Path(tokenizer) / name).exists() for name in store.COMPANIONS):
        raise UserError(f"{tokenizer} has none of the files {', '.join(store.COMPANIONS)}.")
    if config.init is None:
        as_json = json.loads(json.dumps(config.model))  # YAML has keys that are no text
        return from_hf(as_json, f"{source}, model")
    checkpoint = store.read_checkpoint(config.init)
    if checkpoint.formats:
        raise UserError(
            f"{config.init} has matrices in 8 or 4 bits, which cannot be trained; export it with "
            "--weights bf16 and convert that."
        )
    return checkpoint.config


def _first_state(
    config: TrainConfig,
    model: Llama4Config,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    if config.init is None:
        return init_state(model, optimizer, mesh, config.seed)
    return state_of(store.load(config.init, mesh, "float32")[1], model, optimizer, mesh)


def _tokens(config: TrainConfig, model: Llama4Config) -> tuple[np.ndarray, np.ndarray]:
    """Training tokens and held-out tokens, both known to be of use."""
    wanted, begin_id = config.data, model.bos_token_id
    tokens = data.read_tokens(wanted.tokens, wanted.dtype)
    data.check_tokens(tokens, model.vocab_size, wanted.tokens)
    data.check_documents(tokens, begin_id, wanted.held_out_every, wanted.tokens)
    training, held_out = data.split(tokens, begin_id, wanted.held_out_every)
    _training_batch(config, model, training, step=0)  # there are enough of them
    return training, held_out


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


def _every(period: int, step: int) -> bool:
    return period > 0 and step % period == 0
